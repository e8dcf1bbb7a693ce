"""Peers that do what no honest sender does, over the wire: each is answered, nobody else notices, nothing leaks.

The rows about a Start's claims and about single messages are in test_hostile_messages.py, those about digests in
test_execute_items.py and test_peer_identities.py, those about values in tests/integration/test_without_layout.py.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest

from diptych.service.errors import InvalidInputError, LimitExceededError
from diptych.v1 import executor_pb2, tensor_pb2
from diptych.wire.dtypes import DTYPE_OF_NAME
from diptych.wire.framing import ItemChunk
from executor_service.front import credit, stream
from executor_service.front.claims import attest_tensors
from registry import ItemLayout, Run, TensorSpec
from tests.executor_service.peer import Peer, Planned, Planner

MAX_REQUESTS = 200


@pytest.fixture(scope="module")
def executor_settings() -> dict[str, Any]:
    return {"media_memory": "1MiB", "receive_timeout": 2.0, "max_requests": MAX_REQUESTS}


class Bystander:
    """A stream whose first request is being answered; call it to see that nobody has noticed anything.

    `expected` are the tokens of an honest request of the planner.
    """

    def __init__(self, peer: Peer, planner: Planner) -> None:
        self._peer, self._planner = peer, planner
        long = planner.plan(max_tokens=120)
        self._undisturbed = peer.run(0, long).tokens
        self.expected = self._undisturbed[:8]
        peer.start(1, long)
        peer.wait_credit(1)
        peer.send_tensors(1, long)
        while not peer.answers[1].tokens:
            peer.read()

    def __call__(self) -> None:
        assert self._peer.run(2, self._planner.plan()).tokens == self.expected, "the next request"
        answer = self._peer.finish(1)
        assert answer.finals[0].HasField("completion")
        assert answer.tokens == self._undisturbed
        assert len(answer.tokens) == 120


@pytest.fixture
def bystander(channel, planner) -> Iterator[Bystander]:
    """On another stream; `channel` looks afterwards whether everything is free again, and whole."""
    with Peer(channel) as peer:
        yield Bystander(peer, planner)


def test_ten_thousand_starts_without_a_chunk(channel, planner, bystander) -> None:
    """As many as are allowed wait, the rest is refused at once, and those who wait are not waited for."""
    start = planner.plan().start
    with Peer(channel) as peer:
        for handle in range(10_000):
            peer.send(executor_pb2.ExecuteRequest(handle=handle, start=start))
        for handle in range(10_000):
            peer.finish(handle)
    codes = [peer.answers[handle].code.name for handle in range(10_000)]
    assert set(codes) == {"RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
    assert codes[: MAX_REQUESTS - 10] == ["DEADLINE_EXCEEDED"] * (MAX_REQUESTS - 10)
    assert codes.count("RESOURCE_EXHAUSTED") > 5000
    for handle, code in enumerate(codes):
        answer = peer.answers[handle]
        is_refused = code == "RESOURCE_EXHAUSTED"
        assert answer.facts["stage"] == ("admit" if is_refused else "receive")
        text = f"at most {MAX_REQUESTS} are taken" if is_refused else "no byte arrived for 2 s, 9408 were asked for"
        assert text in answer.status.message
        assert len(answer.finals) == 1
    bystander()


def test_chunks_before_credit(channel, planner, server, bystander) -> None:
    """The arena is full of others' items: who sends all the same has no credit for it."""
    hogs = [planner.plan(text="<image>" * 4, sizes=((60, 80),) * 4) for _ in range(28)]
    with Peer(channel) as others, Peer(channel) as peer:
        for handle, planned in enumerate(hogs):
            others.start(handle, planned)
        others.wait_credit(26)
        planned = planner.plan()
        peer.start(1, planned)
        peer.send_tensors(1, planned)
        answer = peer.finish(1)
        assert (answer.code.name, answer.facts["stage"]) == ("INVALID_ARGUMENT", "receive")
        assert "9408 bytes sent, credit was given for 0" in answer.status.message
        for handle in range(len(hogs)):
            others.cancel(handle)
            others.finish(handle)
    bystander()


def test_a_handle_is_free_again_after_its_final(channel, planner, bystander) -> None:
    with Peer(channel) as peer:
        for _ in range(2):
            assert peer.run(7, planner.plan()).tokens == bystander.expected
            del peer.answers[7]
    bystander()


@pytest.mark.parametrize("sent", [0, 100])
def test_half_closed_before_everything_was_sent(channel, planner, bystander, sent: int) -> None:
    """Nobody waits for what cannot come any more; what is complete is answered to its end."""
    whole, part = planner.plan(max_tokens=40), planner.plan()
    with Peer(channel) as peer:
        peer.start(1, whole)
        peer.start(2, part)
        peer.wait_credit(1)
        peer.wait_credit(2)
        peer.send_tensors(1, whole)
        if sent:
            peer.send_chunk(2, 0, 0, 0, bytes(sent))
        peer.half_close()
        answer = peer.finish(2)
        assert (answer.code.name, answer.facts["stage"]) == ("INVALID_ARGUMENT", "receive")
        assert "half-closed before all of items [0]" in answer.status.message
        assert len(peer.finish(1).tokens) == 40
        assert peer.answers[1].tokens[:8] == bystander.expected
        with pytest.raises(StopIteration):
            next(peer.call)
    bystander()


def test_half_closed_while_waiting_for_room(channel, planner, bystander) -> None:
    hog = [planner.plan(text="<image>" * 4, sizes=((60, 80),) * 4) for _ in range(28)]
    with Peer(channel) as others, Peer(channel) as peer:
        for handle, planned in enumerate(hog):
            others.start(handle, planned)
        others.wait_credit(26)
        peer.start(1, planner.plan())
        peer.half_close()
        for handle in range(len(hog)):
            others.cancel(handle)
        answer = peer.finish(1)
        assert (answer.code.name, answer.facts["stage"]) == ("INVALID_ARGUMENT", "receive")
        assert "half-closed before all of items [0]" in answer.status.message
    bystander()


def test_more_bytes_than_credit(channel, planner, bystander, monkeypatch) -> None:
    """Chunks in order and within their tensors, but faster than they were asked for."""
    monkeypatch.setattr(credit, "REQUEST_WINDOW", 4096)
    planned = planner.plan()
    with Peer(channel) as peer:
        peer.start(1, planned)
        assert peer.wait_credit(1).credit == 4096
        peer.send_chunk(1, 0, 0, 0, planned.tensors[0].tobytes())
        answer = peer.finish(1)
    assert (answer.code.name, answer.facts["stage"]) == ("INVALID_ARGUMENT", "receive")
    assert "9408 bytes sent, credit was given for 4096" in answer.status.message
    monkeypatch.undo()
    bystander()


def test_a_picture_twice_in_a_cancelled_request(channel, planner, bystander) -> None:
    """What it was asked for is free again, all of it: the next hundred such requests and an honest one are served."""
    planned = planner.plan("<image> and <image>", sizes=((60, 80), (60, 80)))
    for item in planned.start.items:
        item.media_digest = b"m" * 32
    with Peer(channel) as peer:
        for handle in range(100):
            peer.start(handle, planned)
            peer.wait_credit(handle)
            peer.cancel(handle)
            answer = peer.finish(handle)
            assert answer.missing == [0]
            assert (answer.code.name, answer.facts["stage"]) == ("CANCELLED", "receive")
        assert peer.run(100, planner.plan()).tokens == bystander.expected
    bystander()


def test_a_byte_now_and_then(channel, planner, bystander) -> None:
    """Never quite silent, and yet not waited for: whoever fills the arena like that would keep everybody out."""
    planned = planner.plan()
    is_over = threading.Event()
    with Peer(channel) as peer:

        def drip() -> None:
            for offset in itertools.count():
                peer.send_chunk(1, 0, 0, offset, b"x")
                if is_over.wait(0.3):
                    return

        peer.start(1, planned)
        peer.wait_credit(1)
        dripping = threading.Thread(target=drip)
        dripping.start()
        answer = peer.finish(1)
        is_over.set()
        dripping.join()
    assert (answer.code.name, answer.facts["stage"]) == ("DEADLINE_EXCEEDED", "receive")
    assert re.fullmatch(r"no more than \d+ bytes arrived for 8 s, 9408 were asked for", answer.status.message)
    bystander()


HUGE = {
    "prompt": (lambda start: start.prompt_token_ids.extend([5] * 4_000_000), "admit", " tokens; at most 2047"),
    "output": (lambda start: start.output_token_ids.extend([5] * 4_000_000), "admit", " 4000000 tokens; at most 8 "),
    "axes": (lambda start: start.items[0].tensors[0].shape.extend([1] * 4_000_000), "attest", "of 4000003 axes"),
    "name": (
        lambda start: setattr(start.items[0].tensors[0], "name", "n" * 60_000), "attest",
        f"has tensors {'n' * 128}; pixel_values are expected",
    ),
    "tensors": (
        lambda start: start.items[0].tensors.extend([tensor_pb2.Tensor(name="x")] * 10_000), "attest",
        f"{', x' * 31}; pixel_values are expected",
    ),
    "fingerprint": (lambda start: setattr(start, "fingerprint", b"f" * 20_000_000), "handshake", f"{'66' * 32}, this"),
}  # fmt: skip


@pytest.mark.parametrize("name", HUGE)
def test_a_huge_start_is_answered_briefly(channel, planner, bystander, name: str) -> None:
    """What it claims is cut before it is repeated."""
    change, stage, text = HUGE[name]
    start = planner.plan().start
    change(start)
    with Peer(channel) as peer:
        peer.send(executor_pb2.ExecuteRequest(handle=1, start=start))
        answer = peer.finish(1)
        code = "FAILED_PRECONDITION" if stage == "handshake" else "INVALID_ARGUMENT"
        assert (answer.code.name, answer.facts["stage"]) == (code, stage)
        assert text in answer.status.message
        assert answer.status.ByteSize() < 10_000
        assert peer.run(2, planner.plan()).tokens == bystander.expected
    bystander()


class Endless(Sequence[Any]):
    """Has a length, and nobody may walk over more than the beginning of it."""

    def __len__(self) -> int:
        return 50_000_000

    def __getitem__(self, key: Any) -> Any:
        assert isinstance(key, slice)
        assert key.stop < 1000
        return [1] * key.stop

    def __iter__(self) -> Any:
        raise AssertionError("it is walked over, and the event loop stands still")


def test_a_start_is_counted_before_it_is_walked_over(planner, server) -> None:
    admission, honest = server[0].front._admission, planner.plan().start
    for name in ("prompt_token_ids", "output_token_ids"):
        fields = {field.name: getattr(honest, field.name) for field in honest.DESCRIPTOR.fields}
        with pytest.raises(LimitExceededError, match="50000000 tokens; at most"):
            admission.admit(SimpleNamespace(**{**fields, name: Endless()}, HasField=honest.HasField))
    spec = ItemLayout((Run(3, 1),), {"x": TensorSpec("uint8", (3, 4))})
    tensor = SimpleNamespace(name="x", dtype=DTYPE_OF_NAME["uint8"], shape=Endless())
    with pytest.raises(InvalidInputError, match="of 50000000 axes for x; it must be"):
        attest_tensors(0, [tensor], spec)


def test_streams_that_come_and_go(channel, planner, server, bystander) -> None:
    """200 streams, each dropped at another point."""
    rng = np.random.default_rng(5)
    for _ in range(200):
        planned: Planned = planner.plan(max_tokens=int(rng.integers(1, 200)))
        with Peer(channel) as peer:
            stage = rng.integers(0, 5)
            if stage > 0:
                peer.start(1, planned)
            if stage > 1:
                peer.wait_credit(1)
            if stage > 2:
                peer.send_tensors(1, planned)
            if stage > 3:
                peer.read()
    bystander()


def test_nothing_but_noise(channel, planner, bystander) -> None:
    """Bytes that are no message end their stream with INVALID_ARGUMENT."""
    rng = np.random.default_rng(9)
    method = channel.stream_stream(
        "/diptych.v1.ExecutorService/Execute", request_serializer=bytes, response_deserializer=bytes
    )
    for size in (1, 2, 7, 100, 5000, 1_000_000):
        call = method(iter([b"\xff" + rng.bytes(size)]), timeout=20)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "are no message that /diptych.v1.ExecutorService/Execute takes" in caught.value.details()
    bystander()


def test_a_message_of_more_parts_than_any_request_has(channel, planner, bystander) -> None:
    """It is not parsed, so that nobody knows whose it is: its stream ends, and with it what else was on it."""
    start = planner.plan().start
    start.items.extend([executor_pb2.MediaItem()] * 70_000)
    with Peer(channel) as peer:
        peer.start(1, planner.plan())
        peer.wait_credit(1)
        peer.send(executor_pb2.ExecuteRequest(handle=2, start=start))
        with pytest.raises(grpc.RpcError, match="the message has more than 65536 fields") as caught:
            peer.finish(1)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    bystander()


async def test_handles_that_have_ended_are_remembered_within_bounds(monkeypatch) -> None:
    """Late chunks for the last ones are ignored; for older ones they are as wrong as for handles never started."""
    monkeypatch.setattr(stream, "MAX_ENDED_HANDLES", 3)
    one = stream.ExecuteStream(None, "peer")  # type: ignore[arg-type]
    for handle in range(5):
        one.put_final(executor_pb2.Final(handle=handle))
    assert len(one._ended) == 3
    one._outgoing.clear()
    for handle in (2, 3, 4, 0):
        one.handle(ItemChunk(handle, 0, 0, 0, memoryview(b"x")))
    assert [response.final.handle for response, _ in one._outgoing] == [0]
