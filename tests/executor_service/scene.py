"""A stream to misbehave on, and honest requests that must not notice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import grpc
import pytest

from tests.executor_service.peer import Answer, Peer, Planned, Planner

HONEST, NEXT = 9001, 9002


class Scene:
    """`peer` misbehaves. On its stream and on another an honest request is in the middle of its transfer."""

    def __init__(self, peer: Peer, other: Peer, planner: Planner) -> None:
        self.peer = peer
        self._streams = (peer, other)
        self._planned: Planned = planner.plan()
        self.expected = other.run(0, self._planned).tokens
        """What an honest request of the planner is answered."""
        data = self._planned.tensors[0].tobytes()
        self._half, self._rest = len(data) // 2, data[len(data) // 2 :]
        for stream in self._streams:
            stream.start(HONEST, self._planned)
            stream.wait_credit(HONEST)
            stream.send_chunk(HONEST, 0, 0, 0, data[: self._half])

    def check_refused(self, handle: int, code: str, stage: str, text: str, **facts: str) -> Answer:
        """The request ends, without a token, with this status and no other."""
        answer = self.peer.finish(handle)
        assert (answer.code.name, answer.facts["stage"]) == (code, stage), answer.status.message
        assert text in answer.status.message
        assert {name: answer.facts.get(name) for name in facts} == facts
        assert not answer.tokens
        return answer

    def finish(self) -> None:
        """The honest requests get their answers, and so do the next ones, on the same stream too."""
        for stream in self._streams:
            stream.send_chunk(HONEST, 0, 0, self._half, self._rest)
            assert stream.finish(HONEST).tokens == self.expected
            assert stream.run(NEXT, self._planned).tokens == self.expected
            assert all(len(answer.finals) <= 1 for answer in stream.answers.values()), "a request ended twice"


@pytest.fixture
def scene(channel: grpc.Channel, planner: Planner) -> Iterator[Scene]:
    """Finished after the test; then `channel` looks whether everything is free again, and whole."""
    with ExitStack() as streams:
        one = Scene(streams.enter_context(Peer(channel)), streams.enter_context(Peer(channel)), planner)
        yield one
        one.finish()
