"""What the service tells its executors, which it picks, and what it makes of answers that nobody expects."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest

from diptych.client import AsyncClient, Media, Prompt, RequestError
from diptych.service.errors import IncompatibleError
from diptych.service.lifecycle import GrpcFrame, running
from diptych.v1 import executor_pb2, preprocess_pb2, tensor_pb2
from diptych.v1.preprocess_pb2_grpc import PreprocessServiceStub
from preprocess_service.media import decode
from preprocess_service.planning import Checkpoint
from preprocess_service.server import SERVICE_NAME as PREPROCESS_NAME
from preprocess_service.server import PreprocessServer
from preprocess_service.settings import PreprocessSettings
from registry.fingerprint import Fingerprint
from tests.preprocess_service.serving import served
from tests.stand_in_executor import SERVICE_NAME, StandInExecutor, eventually
from tests.tiny_checkpoint import encoded, picture

IMAGE = Media(encoded(picture()))


async def test_the_least_loaded_executor_takes_the_request(checkpoint_dir: Path, checkpoint: Checkpoint) -> None:
    both = [StandInExecutor(checkpoint.fingerprint) for _ in range(2)]
    async with served(checkpoint_dir, *both) as (server, client):
        assert server._executors is not None
        known = server._executors._executors
        for busy, idle in (both, both[::-1]):
            busy.num_running, idle.num_running = 9, 1
            await eventually(lambda: [one.load for one in known] == [one.num_running for one in both])
            for one in both:
                one.requests.clear()
            for _ in range(3):
                await client.generate(Prompt("x"), max_tokens=1)
            assert (len(busy.requests), len(idle.requests)) == (0, 3)


async def test_the_strictest_executor_limits_pictures(checkpoint_dir: Path, checkpoint: Checkpoint) -> None:
    strict = StandInExecutor(checkpoint.fingerprint, max_image_pixels=1000, max_image_side=100)
    lax = StandInExecutor(checkpoint.fingerprint, max_image_pixels=5000, max_image_side=200)
    async with served(checkpoint_dir, strict, lax) as (server, client):
        assert server._executors is not None
        await eventually(lambda: server._executors is not None and len(server._executors.ready) == 2)
        for size, limit in (((30, 40), "1000"), ((2, 150), "100")):
            with pytest.raises(RequestError) as caught:
                await client.plan(Prompt("<image>", [Media(encoded(picture(*size)))]))
            assert (caught.value.details["stage"], caught.value.details["limit"]) == ("probe", limit)
        assert (await client.plan(Prompt("<image>", [Media(encoded(picture(20, 50)))]))).items


async def test_the_trace_goes_on_to_the_executor(
    server: PreprocessServer, client: AsyncClient, executor: StandInExecutor
) -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    request = preprocess_pb2.GenerateRequest(
        prompt=preprocess_pb2.Prompt(text="x"), sampling=tensor_pb2.SamplingParams(max_tokens=1)
    )
    async with grpc.aio.insecure_channel(server.address) as channel:
        async for _ in PreprocessServiceStub(channel).Generate(request, metadata=(("traceparent", trace),)):
            pass
    assert executor.requests[-1].start.traceparent == trace
    await client.generate(Prompt("x"), max_tokens=1)
    own = executor.requests[-1].start.traceparent
    assert own.endswith("-00"), "nobody records it, but the logs of both services have its id"
    assert own.split("-")[1] not in trace


@pytest.mark.parametrize("priority", [None, -3, 0, 7])
async def test_priority_travels_to_the_executor(
    client: AsyncClient, executor: StandInExecutor, priority: int | None
) -> None:
    """None is the default, which the executor takes for 0."""
    await client.generate(Prompt("x"), max_tokens=1, **({} if priority is None else {"priority": priority}))
    assert executor.requests[-1].start.priority == (priority or 0)


async def test_a_client_that_goes_away_ends_the_decoding(
    checkpoint_dir: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker is held at the first item; what waits for it is never decoded."""
    executor = StandInExecutor(checkpoint.fingerprint)
    decoded: list[int] = []
    go_on, real = threading.Event(), decode.decode_image

    def held(item: Any, index: int) -> Any:
        decoded.append(index)
        go_on.wait(20)
        return real(item, index)

    monkeypatch.setitem(decode._DECODERS, "image", held)  # type: ignore[arg-type]
    async with served(checkpoint_dir, executor, media_threads=1) as (_, client):
        request = asyncio.create_task(client.generate(Prompt("<image>" * 4, [IMAGE] * 4)))
        await eventually(lambda: bool(decoded and executor.requests))
        request.cancel()
        await eventually(executor.requests[-1].cancelled.is_set)
        go_on.set()
        await client.generate(Prompt("<image>", [IMAGE]), max_tokens=1)
    assert decoded == [0, 0]


async def test_a_stop_string_in_what_is_held_back_to_the_end(
    client: AsyncClient, executor: StandInExecutor, checkpoint: Checkpoint
) -> None:
    """A last token that ends within a character: its whole characters come only with the end, and count."""
    tokenizer = checkpoint.tokenizer
    token = next(i for i in range(4, 590) if tokenizer.num_incomplete([i]) and len(tokenizer.decode([i])) > 1)
    letter = tokenizer.decode([token])[-2]
    executor.script = lambda start: [token]
    answer = await client.generate(Prompt("x"), stop=[letter])
    assert answer.final is not None
    assert (answer.final.finish_reason, answer.final.stop) == ("stop", letter)
    assert answer.text == tokenizer.decode([token])[:-2]


class Garbling(StandInExecutor):
    """Answers with what the contract does not know."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.garbled = asyncio.Event()

    async def start(self, port: int = 0) -> None:
        """As ever, but that an answer may be bytes."""
        self.frame = GrpcFrame("127.0.0.1", port, SERVICE_NAME)
        handlers = {
            "GetModel": grpc.unary_unary_rpc_method_handler(
                self.GetModel,
                request_deserializer=executor_pb2.GetModelRequest.FromString,
                response_serializer=executor_pb2.GetModelResponse.SerializeToString,
            ),
            "WatchLoad": grpc.unary_stream_rpc_method_handler(
                self.WatchLoad,
                request_deserializer=executor_pb2.WatchLoadRequest.FromString,
                response_serializer=executor_pb2.WatchLoadResponse.SerializeToString,
            ),
            "Execute": grpc.stream_stream_rpc_method_handler(
                self.Execute,
                request_deserializer=executor_pb2.ExecuteRequest.FromString,
                response_serializer=lambda response: (
                    response if isinstance(response, bytes) else response.SerializeToString()
                ),
            ),
        }
        self.frame.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))
        self.address = await self.frame.start()
        await self.frame.set_serving(True)

    async def _generate(self, handle: int, one: Any, final: executor_pb2.Final, responses: Any) -> None:
        responses.put_nowait(self.answer(handle))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(one.cancelled.wait(), 20)

    def answer(self, handle: int) -> Any:
        """Tokens for more requests than there are handles."""
        return executor_pb2.ExecuteResponse(step_outputs=executor_pb2.StepOutputs(handles=[handle], token_ids=[5, 6]))


class Malformed(Garbling):
    """Answers with bytes that are no message."""

    def answer(self, handle: int) -> Any:
        """No tag of any field."""
        return b"\xff\xff\xff"


@pytest.mark.parametrize("kind", [Garbling, Malformed])
async def test_an_answer_nobody_understands_loses_the_stream(
    checkpoint_dir: Path, checkpoint: Checkpoint, kind: type[Garbling], caplog: pytest.LogCaptureFixture
) -> None:
    executor = kind(checkpoint.fingerprint)
    async with served(checkpoint_dir, executor) as (_, client):
        with pytest.raises(RequestError) as caught:
            await client.generate(Prompt("x"), timeout=10)
        assert (caught.value.code, caught.value.details["stage"]) == ("UNAVAILABLE", "executor")
        assert "unexpected answer" in caplog.text
        executor.answer = lambda handle: executor_pb2.ExecuteResponse()  # type: ignore[method-assign]
        streams = executor.num_streams
        with pytest.raises(RequestError):
            await client.generate(Prompt("x"), timeout=0.5)
        assert executor.num_streams == streams + 1


async def test_a_message_that_cannot_be_sent_loses_the_stream(
    checkpoint_dir: Path, checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    executor = StandInExecutor(checkpoint.fingerprint)
    executor.delay = 0.05
    async with served(checkpoint_dir, executor) as (server, client):
        request = asyncio.create_task(client.generate(Prompt("many words to say " * 9), timeout=10))
        await eventually(lambda: bool(executor.requests))
        assert server._executors is not None
        (stream,) = server._executors._executors[0]._streams
        stream._outbox.add_control("no message")  # type: ignore[arg-type]
        with pytest.raises(RequestError) as caught:
            await request
        assert (caught.value.code, caught.value.details["stage"]) == ("UNAVAILABLE", "executor")
        assert "unexpected error while sending" in caplog.text
        executor.delay = 0
        assert (await client.generate(Prompt("again"), max_tokens=1)).final is not None


async def test_an_incompatible_executor_ends_the_boot(checkpoint_dir: Path, checkpoint: Checkpoint) -> None:
    parts = {**checkpoint.fingerprint.parts, "item layout": b"other"}
    other = StandInExecutor(Fingerprint(b"x" * 32, parts, checkpoint.fingerprint.probes))
    await other.start()
    settings = PreprocessSettings(model=checkpoint_dir, port=0, executor=other.address)
    with pytest.raises(IncompatibleError, match="disagree with this service on: item layout"):
        async with running(PreprocessServer(settings)):
            pass
    await other.stop()


async def test_executors_come_and_go(checkpoint_dir: Path, checkpoint: Checkpoint) -> None:
    first = StandInExecutor(checkpoint.fingerprint)
    await first.start()
    port = int(first.address.rsplit(":", 1)[1])
    settings = PreprocessSettings(model=checkpoint_dir, port=0, executor=f"127.0.0.1:1,{first.address}")
    async with running(PreprocessServer(settings)) as server, AsyncClient(server.address) as client:
        first.delay = 0.05
        stream = client.stream(Prompt("words and more words and more"))
        await anext(stream)
        await first.stop()
        with pytest.raises(RequestError) as caught:
            async for _ in stream:
                pass
        assert (caught.value.code, caught.value.details["stage"]) == ("UNAVAILABLE", "executor")
        with pytest.raises(RequestError) as caught:
            await client.generate(Prompt("x"))
        error = caught.value
        assert (error.code, error.details["retryable"]) == ("UNAVAILABLE", "true")
        assert await client.health() == "SERVING"
        assert await client.health(PREPROCESS_NAME) == "NOT_SERVING"
        assert (await client.plan(Prompt("still plans"))).prompt_token_ids
        second = StandInExecutor(checkpoint.fingerprint)
        await second.start(port)
        for _ in range(500):
            if await client.health(PREPROCESS_NAME) == "SERVING":
                break
            await asyncio.sleep(0.02)
        assert (await client.generate(Prompt("again"), max_tokens=1)).final is not None
        await second.stop()


async def test_a_start_that_no_executor_reads_is_not_sent(checkpoint_dir: Path, checkpoint: Checkpoint) -> None:
    """It would end the stream, and with it what others have asked for on it."""
    executor = StandInExecutor(checkpoint.fingerprint, max_model_len=1 << 24, max_items_per_prompt={"image": 5000})
    executor.has_room.clear()
    async with served(checkpoint_dir, executor) as (_, client):
        other = asyncio.create_task(client.generate(Prompt("<image>", [IMAGE]), max_tokens=1))
        await eventually(lambda: bool(executor.requests))
        with pytest.raises(RequestError) as caught:
            await client.generate(Prompt("<image>" * 5000, [IMAGE] * 5000), max_tokens=1)
        assert (caught.value.code, caught.value.details["limit"]) == ("INVALID_ARGUMENT", "65536")
        executor.has_room.set()
        assert (await other).token_ids
    assert (len(executor.requests), executor.num_streams) == (1, 1)
