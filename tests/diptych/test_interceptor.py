"""What a failing method tells its client, over real gRPC: nothing of its insides, and always our details."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from diptych.service import interceptor
from diptych.service.lifecycle import GrpcFrame
from diptych.v1 import preprocess_pb2
from diptych.v1.preprocess_pb2_grpc import PreprocessServiceServicer, add_PreprocessServiceServicer_to_server

SECRET = "the secret of the house"
SERVICE = "diptych.v1.PreprocessService"
MALFORMED = (b"\xff\xff\xff", b"\x08\x01\x1a\x02\x08", b"\x1a\x04\x0a\x02\xff\xfe")
"""No tag; a message cut off; text that is no UTF-8."""


class Broken(PreprocessServiceServicer):
    """Fails with what nobody is to see."""

    async def Tokenize(self, request: Any, context: Any) -> preprocess_pb2.TokenizeResponse:  # noqa: N802
        raise RuntimeError(SECRET)

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        yield preprocess_pb2.GenerateResponse(text="so far")
        raise RuntimeError(SECRET)


@pytest_asyncio.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    frame = GrpcFrame("127.0.0.1", 0, SERVICE)
    add_PreprocessServiceServicer_to_server(Broken(), frame.server)
    address = await frame.start()
    async with grpc.aio.insecure_channel(address) as channel:
        yield channel
    await frame.stop(0)


async def test_a_handler_is_wrapped_once(channel: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often its method is called."""
    wrapped: list[str] = []
    real = interceptor._wrapped

    def noted(handler: grpc.RpcMethodHandler, method: str, max_text_bytes: int) -> grpc.RpcMethodHandler:
        wrapped.append(method)
        return real(handler, method, max_text_bytes)

    monkeypatch.setattr(interceptor, "_wrapped", noted)
    for method in ("Tokenize", "Generate", "Tokenize", "Generate"):
        await call(channel, method, b"")
    for _ in range(2):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(f"/{SERVICE}/Nonsense")(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert wrapped == [f"/{SERVICE}/Tokenize", f"/{SERVICE}/Generate"]


async def _read_all(call: Any) -> None:
    async for _ in call:
        pass


async def call(channel: grpc.aio.Channel, method: str, data: bytes) -> tuple[grpc.aio.AioRpcError, dict[str, str]]:
    """The error of a call with these bytes, and its ErrorInfo."""
    path = f"/{SERVICE}/{method}"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (_read_all(channel.unary_stream(path)(data)) if method == "Generate" else channel.unary_unary(path)(data))
    info = error_details_pb2.ErrorInfo()
    status = rpc_status.from_call(caught.value)
    assert status is not None
    assert status.details[0].Unpack(info)
    assert info.domain == "diptych.dev"
    return caught.value, dict(info.metadata)


@pytest.mark.parametrize("method", ["Tokenize", "Generate"])
async def test_an_unexpected_error_shows_nothing_of_itself(
    channel: grpc.aio.Channel, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    error, facts = await call(channel, method, b"")
    assert error.code() is grpc.StatusCode.INTERNAL
    assert facts == {"stage": "rpc", "retryable": "false"}
    assert SECRET not in f"{error.details()} {error.trailing_metadata()}"
    (record,) = [record for record in caplog.records if record.name == "diptych.rpc"]
    assert record.levelno == logging.ERROR
    assert SECRET in caplog.text


@pytest.mark.parametrize("method", ["Tokenize", "Generate"])
@pytest.mark.parametrize("data", MALFORMED)
async def test_malformed_bytes_are_the_clients_mistake(
    channel: grpc.aio.Channel, method: str, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    error, facts = await call(channel, method, data if method == "Generate" else b"\xff\xff\xff")
    assert (error.code(), facts["stage"]) == (grpc.StatusCode.INVALID_ARGUMENT, "receive")
    assert f"/{SERVICE}/{method}" in str(error.details())
    assert "DecodeError" not in str(error.details())
    assert not [record for record in caplog.records if record.name == "diptych.rpc"]


@pytest.mark.parametrize("method", ["Tokenize", "Generate"])
async def test_a_message_of_millions_of_parts_is_not_parsed(channel: grpc.aio.Channel, method: str) -> None:
    """Parsed, it would stop all others for seconds; and the method, called with it, would be INTERNAL."""
    error, facts = await call(channel, method, b"\x7a\0" * 20_000_000)
    assert (error.code(), facts["stage"]) == (grpc.StatusCode.INVALID_ARGUMENT, "receive")
    assert (facts["limit"], facts["retryable"]) == ("65536", "false")
    assert "more than 65536 fields" in str(error.details())


async def test_what_arrives_for_grpcs_own_services_is_looked_at_as_well(channel: grpc.aio.Channel) -> None:
    check = channel.unary_unary("/grpc.health.v1.Health/Check")
    watch = channel.unary_stream("/grpc.health.v1.Health/Watch")
    reflection = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
    for call in (check, lambda data: _read_all(watch(data)), lambda data: _read_all(reflection(iter([data])))):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"\x0a\0" * 20_000_000)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert await check(b"") == b"\x08\1"
    assert await anext(aiter(watch(b""))) == b"\x08\1"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await check(b"\x0a\3who")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
