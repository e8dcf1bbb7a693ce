"""`Execute` under random interleavings of legal and illegal messages, against a model of the protocol.

Real executor, real wire. The model knows for every request which ends are allowed; whatever happens, each admitted
request gets exactly one Final, honest ones get the right tokens, and afterwards blocks, caches, buffers and credit
are whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from PIL import Image

from diptych.service.lifecycle import CHANNEL_OPTIONS
from diptych.v1 import executor_pb2
from registry import MediaInfo, MediaItem
from registry.fingerprint import fingerprint
from tests.executor_service.peer import Peer, Planned, Planner
from tests.services import wait_idle

NUM_PICTURES = 3
TEXTS = ("One <image>?", "<image> and <image>", "none at all")
PIECE = 4000


@pytest.fixture(scope="module")
def executor_settings() -> dict[str, Any]:
    return {
        "media_memory": "96KiB",
        "kv_cache_memory": "2MiB",
        "encoder_cache_memory": "48KiB",
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "receive_timeout": 60,
    }


@dataclass
class Sent:
    """What the model knows of one handle."""

    planned: Planned
    allowed: set[str]
    """Status names it may end with; OK: with the right tokens."""
    kind: tuple[int, tuple[int, ...]] | None = None
    progress: dict[int, int] = field(default_factory=dict)
    is_spoilt: bool = False
    is_stopped: bool = False


class Wire:
    """What all examples share: the server's channel, honest requests, and their answers."""

    def __init__(self, channel: grpc.Channel, planner: Planner) -> None:
        self.channel, self.planner = channel, planner
        self.pictures = [
            Image.fromarray(np.random.default_rng(n).integers(0, 256, (60, 80, 3), dtype=np.uint8))
            for n in range(NUM_PICTURES)
        ]
        self.expected: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        with Peer(channel) as peer:
            for handle, kind in enumerate(self.kinds()):
                self.expected[kind] = list(peer.run(handle, self.plan(kind)).tokens)

    def kinds(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        for first in range(NUM_PICTURES):
            yield 0, (first,)
            for second in range(NUM_PICTURES):
                yield 1, (first, second)
        yield 2, ()

    def plan(self, kind: tuple[int, tuple[int, ...]], salt: str | None = None) -> Planned:
        """Offering digests that begin with `salt`, or none."""
        text, pictures = kind
        items = [MediaItem(MediaInfo.image(60, 80), self.pictures[n]) for n in pictures]
        planned = self.planner.plan_items(TEXTS[text], items, max_tokens=6)
        for number, item in zip(pictures, planned.start.items, strict=True):
            if salt is not None:
                item.media_digest = hashlib.sha256(f"{salt} {number}".encode()).digest()
        return planned


class ExecuteMachine(RuleBasedStateMachine):
    """One stream at a time; `wire` is set by the test."""

    wire: Wire

    @initialize()
    def connect(self) -> None:
        self.peer = Peer(self.wire.channel, timeout=15)
        self.sent: dict[int, Sent] = {}
        self.next_handle = 1

    # --- legal ------------------------------------------------------------------------------------

    @rule(data=st.data(), salt=st.sampled_from(["a", "b", None]), priority=st.integers(-2, 2))
    def start(self, data: st.DataObject, salt: str | None, priority: int) -> None:
        kind = data.draw(st.sampled_from(sorted(self.wire.expected)))
        planned = self.wire.plan(kind, salt)
        planned.start.priority = priority
        self._start(Sent(planned, {"OK"}, kind))

    @rule(index=st.integers(0, 20))
    def send_a_piece(self, index: int) -> None:
        if (handle := self._pick(index)) is not None:
            self._send_next(handle)

    @rule(index=st.integers(0, 20))
    def cancel(self, index: int) -> None:
        if (handle := self._pick(index)) is not None:
            self.peer.cancel(handle)
            self.sent[handle].allowed |= {"CANCELLED"}
            self.sent[handle].is_spoilt = True

    @rule(index=st.integers(0, 20))
    def stop(self, index: int) -> None:
        """It ends well with what it has, or as cancelled if that is nothing."""
        if (handle := self._pick(index)) is not None:
            self.peer.stop(handle)
            self.sent[handle].allowed |= {"CANCELLED"} | ({"OK"} if self.sent[handle].kind is not None else set())
            self.sent[handle].is_spoilt = self.sent[handle].is_stopped = True

    @rule()
    def read(self) -> None:
        if any(not self._is_ended(handle) for handle in self.sent):
            self._read_until(lambda: True)

    @rule()
    def another_stream(self) -> None:
        """The stream goes away with everything on it; a new one knows nothing of it."""
        self.peer.__exit__()
        self.connect()

    # --- illegal ----------------------------------------------------------------------------------

    @rule(lie=st.sampled_from(["fingerprint", "shape", "length", "token", "digest", "temperature"]))
    def start_with_a_lie(self, lie: str) -> None:
        planned = self.wire.plan((0, (0,)), "a")
        start, item = planned.start, planned.start.items[0]
        if lie == "fingerprint":
            start.fingerprint = b"x" * 32
        elif lie == "shape":
            item.tensors[0].shape[0] = 4
        elif lie == "length":
            item.placeholder.length -= 1
        elif lie == "token":
            start.prompt_token_ids[0] = 2**31
        elif lie == "digest":
            item.media_digest = b"short"
        else:
            start.sampling.temperature = -1
        wanted = "FAILED_PRECONDITION" if lie == "fingerprint" else "INVALID_ARGUMENT"
        self._start(Sent(planned, {wanted}, is_spoilt=True))

    @rule(
        index=st.integers(0, 20), item=st.integers(0, 3), tensor=st.integers(0, 2),
        offset=st.sampled_from([1, 77, 9408, 2**40, 2**64 - 1]), size=st.sampled_from([0, 1, 5000]),
    )  # fmt: skip
    def send_a_wrong_chunk(self, index: int, item: int, tensor: int, offset: int, size: int) -> None:
        """No honest chunk begins at these offsets."""
        if (handle := self._pick(index)) is not None:
            self.peer.send_chunk(handle, item, tensor, offset, bytes(size))
            # It may be complete, or ended, before the chunk arrives.
            self.sent[handle].allowed |= {"INVALID_ARGUMENT"}
            self.sent[handle].is_spoilt = True

    @rule(index=st.integers(0, 20))
    def start_a_live_handle(self, index: int) -> None:
        """One that has bytes to send and is not spoilt is live for certain."""
        if (handle := self._pick(index)) is not None and self._has_bytes_to_send(handle):
            self.peer.start(handle, self.sent[handle].planned)
            self.sent[handle].allowed = {"INVALID_ARGUMENT"}
            self.sent[handle].is_spoilt = True

    @rule(kind=st.sampled_from(["chunk", "cancel", "empty"]))
    def speak_of_a_handle_that_never_was(self, kind: str) -> None:
        handle, self.next_handle = self.next_handle, self.next_handle + 1
        if kind == "chunk":
            self.peer.send_chunk(handle, 0, 0, 0, b"x")
        elif kind == "cancel":
            self.peer.cancel(handle)
        else:
            self.peer.send(executor_pb2.ExecuteRequest(handle=handle))
        self.sent[handle] = Sent(self.wire.plan((2, ())), {"INVALID_ARGUMENT"}, is_spoilt=True)

    # --- the end ----------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Send what honest requests still miss, cancel the spoilt ones, and look at every end."""
        if not hasattr(self, "peer"):
            return
        for handle, sent in self.sent.items():
            if sent.is_spoilt and "CANCELLED" not in sent.allowed and not self._is_ended(handle):
                self.peer.cancel(handle)
                sent.allowed |= {"CANCELLED"}
        for handle in self.sent:
            while not self._is_ended(handle):
                for other in self.sent:
                    while self._send_next(other):
                        pass
                self.peer.read()
        for handle, sent in self.sent.items():
            self._check_end(handle, sent)
        self.peer.__exit__()

    def _check_end(self, handle: int, sent: Sent) -> None:
        answer = self.peer.answers[handle]
        assert len(answer.finals) == 1
        final = answer.finals[0]
        outcome = "OK" if final.HasField("completion") else answer.code.name
        assert outcome in sent.allowed, (outcome, sent.allowed, final)
        if outcome == "OK":
            assert sent.kind is not None
            expected = self.wire.expected[sent.kind]
            assert answer.tokens == (expected[: len(answer.tokens)] if sent.is_stopped else expected)
            assert answer.tokens
            assert final.completion.usage.completion_tokens == len(answer.tokens)

    # --- how ----------------------------------------------------------------------------------------

    def _start(self, sent: Sent) -> None:
        handle, self.next_handle = self.next_handle, self.next_handle + 1
        self.sent[handle] = sent
        self.peer.start(handle, sent.planned)

    def _pick(self, index: int) -> int | None:
        """A handle that has not ended, as far as we have read."""
        live = [handle for handle in self.sent if not self._is_ended(handle)]
        return live[index % len(live)] if live else None

    def _is_ended(self, handle: int) -> bool:
        answer = self.peer.answers.get(handle)
        return answer is not None and bool(answer.finals)

    def _read_until(self, is_enough) -> None:
        for handle, sent in self.sent.items():
            if sent.is_spoilt or self._is_ended(handle) or not sent.planned.tensors:
                continue
            answer = self.peer.answers.get(handle)
            if answer is None or answer.missing is None:
                return  # it may be waiting for room that only our own sending frees
        if is_enough() and any(self._expects_news(handle) for handle in self.sent):
            self.peer.read()

    def _expects_news(self, handle: int) -> bool:
        """Whether the executor owes this request something: everything it asked for has been sent."""
        answer, sent = self.peer.answers.get(handle), self.sent[handle]
        if answer is None or answer.finals or sent.is_spoilt:
            return False
        if not sent.planned.tensors:
            return True
        return answer.missing is not None and all(
            sent.progress.get(item, 0) == sent.planned.tensors[item].nbytes for item in answer.missing
        )

    def _has_bytes_to_send(self, handle: int) -> bool:
        answer, sent = self.peer.answers.get(handle), self.sent[handle]
        if answer is None or not answer.missing or sent.is_spoilt:
            return False
        return any(sent.progress.get(item, 0) < sent.planned.tensors[item].nbytes for item in answer.missing)

    def _send_next(self, handle: int) -> bool:
        """The next piece that the executor has asked for and given credit for; False if there is none."""
        answer, sent = self.peer.answers.get(handle), self.sent[handle]
        if answer is None or answer.finals or not answer.missing or sent.is_spoilt:
            return False
        spent = sum(sent.progress.values())
        for item in answer.missing:
            data, at = sent.planned.tensors[item].tobytes(), sent.progress.get(item, 0)
            size = min(PIECE, len(data) - at, answer.credit - spent)
            if size > 0:
                self.peer.send_chunk(handle, item, 0, at, data[at : at + size])
                sent.progress[item] = at + size
                return True
        return False


# The server's threads are this process's: one may draw a random number just while the machine draws its next step.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
def test_random_interleavings(server) -> None:
    executor, loop = server
    with grpc.insecure_channel(executor.address, options=CHANNEL_OPTIONS) as channel:
        family = executor.front.family
        wire = Wire(channel, Planner(family, fingerprint(family).digest))

        class Machine(ExecuteMachine):
            def teardown(self) -> None:
                super().teardown()
                wait_idle(channel, executor, loop)

        Machine.wire = wire
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=30,
                stateful_step_count=30,
                suppress_health_check=list(HealthCheck),
                phases=(Phase.explicit, Phase.reuse, Phase.generate),
            ),
        )
