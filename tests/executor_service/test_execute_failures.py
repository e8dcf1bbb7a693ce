"""What nobody expects on an `Execute` stream: bytes that are no message, and a layout that raises."""

from __future__ import annotations

import queue
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from diptych.v1 import executor_pb2
from diptych.wire.framing import encode_request
from registry.errors import RegistryError
from tests.executor_service.peer import Peer, Planner

METHOD = "/diptych.v1.ExecutorService/Execute"
MALFORMED = {
    "no tag": b"\xff\xff\xff",
    "a chunk cut off": b"\x08\x01\x1a\x02\x08",
    "a start that is none": b"\x08\x02\x12\x01\xff",
    "a start of a million items": b"\x08\x02\x12\x80\x89\x7a" + b"\x2a\0" * 1_000_000,
}


class RawStream:
    """An `Execute` call on which a test sends bytes."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        read = executor_pb2.ExecuteResponse.FromString
        self.call: Any = channel.stream_stream(METHOD, response_deserializer=read)(
            iter(self._outbox.get, None), timeout=20
        )

    def send(self, data: bytes) -> None:
        self._outbox.put(data)

    def close(self) -> None:
        self._outbox.put(None)


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_bytes_end_the_call(channel, planner, kind: str, caplog) -> None:
    """A request that was under way is freed: `channel` checks that nothing is left."""
    raw = RawStream(channel)
    raw.send(encode_request(executor_pb2.ExecuteRequest(handle=1, start=planner.plan().start)))
    assert next(raw.call).WhichOneof("message") == "missing_items"
    raw.send(MALFORMED[kind])
    raw.send(encode_request(executor_pb2.ExecuteRequest(handle=2, start=planner.plan().start)))
    with pytest.raises(grpc.RpcError) as caught:
        for _ in raw.call:
            pass
    raw.close()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    info = error_details_pb2.ErrorInfo()
    assert rpc_status.from_call(caught.value).details[0].Unpack(info)
    assert info.metadata["stage"] == "receive"
    assert not [record for record in caplog.records if record.name == "diptych.rpc"]
    with Peer(channel) as peer:
        assert peer.run(1, planner.plan()).tokens


@pytest.mark.parametrize("error", [ZeroDivisionError("rows"), RegistryError("pinpoints")])
def test_a_layout_that_raises_ends_its_request_alone(
    server, channel, planner, monkeypatch, caplog, error: Exception
) -> None:
    family = server[0].front.family
    good, bad, also_good = planner.plan(), planner.plan(sizes=((61, 80),)), planner.plan()
    expected = _run(channel, planner)
    layout = family.layout

    def raising(info: Any) -> Any:
        if info.height == 61:
            raise error
        return layout(info)

    monkeypatch.setattr(family, "layout", raising)
    with Peer(channel) as peer:
        peer.start(1, good)
        peer.wait_credit(1)
        peer.start(2, bad)
        answer = peer.finish(2)
        assert (answer.code, answer.facts["stage"]) == (grpc.StatusCode.INTERNAL, "admit")
        assert str(error) not in answer.status.message
        peer.send_tensors(1, good)
        assert peer.finish(1).tokens == expected
        assert peer.run(3, also_good).tokens == expected
    (record,) = [record for record in caplog.records if record.name == "diptych.executor" and record.exc_info]
    assert record.exc_info is not None
    assert record.exc_info[1] is error


@pytest.mark.parametrize("method", ["receive", "contents", "begin"])
def test_an_item_that_raises_ends_its_request_alone(server, channel, planner, monkeypatch, method: str) -> None:
    """Whether it is on its way in, complete, or has only been announced."""
    expected = _run(channel, planner)
    reception = server[0].front._reception
    real = getattr(reception, method)

    def raising(request: Any, *rest: Any) -> Any:
        if request.handle == 2:
            raise IndexError("a page that is not there")
        return real(request, *rest)

    monkeypatch.setattr(reception, method, raising)
    good, bad = planner.plan(), planner.plan()
    with Peer(channel) as peer:
        peer.start(1, good)
        peer.wait_credit(1)
        peer.start(2, bad)
        if method != "begin":
            peer.wait_credit(2)
            peer.send_tensors(2, bad)
        answer = peer.finish(2)
        stage = "admit" if method == "begin" else "receive"
        assert (answer.code, answer.facts["stage"]) == (grpc.StatusCode.INTERNAL, stage)
        peer.send_tensors(1, good)
        assert peer.finish(1).tokens == expected
        assert len(answer.finals) == 1


def test_an_empty_message_ends_the_live_request_once(channel, planner) -> None:
    with Peer(channel) as peer:
        planned = planner.plan("no picture", sizes=(), max_tokens=1500)
        peer.start(1, planned)
        peer.send(executor_pb2.ExecuteRequest(handle=1))
        answer = peer.finish(1)
        assert "neither start, chunk, cancel nor stop" in answer.status.message
        assert peer.run(2, planner.plan()).tokens
        assert len(answer.finals) == 1


def test_a_request_that_could_not_be_announced_is_submitted_whole(server, channel, planner, monkeypatch) -> None:
    expected = _run(channel, planner)
    monkeypatch.setattr(server[0].front._reception, "expected_slots", lambda request: 1 / 0)
    assert _run(channel, planner) == expected


def _run(channel: grpc.Channel, planner: Planner) -> list[int]:
    with Peer(channel) as peer:
        return peer.run(1, planner.plan()).tokens
