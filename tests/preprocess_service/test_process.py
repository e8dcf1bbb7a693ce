"""`Process` in the middle: a client that goes away, and a deadline that passes between two pieces."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from diptych.client import AsyncClient, Media, Prompt
from diptych.service.errors import DeadlineError
from diptych.v1 import preprocess_pb2, preprocess_pb2_grpc
from diptych.wire import framing
from preprocess_service import requests
from preprocess_service.media import decode
from preprocess_service.pipeline import Pipeline
from preprocess_service.planning import Checkpoint
from preprocess_service.requests import Deadline, Plan, TensorPiece
from tests.preprocess_service.serving import served
from tests.stand_in_executor import StandInExecutor, eventually
from tests.tiny_checkpoint import encoded, picture

TENSOR_BYTES = 3 * 28 * 28
SECONDS = 120.0
"""Of the client's own patience, by the real clock: it never runs out here."""


class Gate:
    """Stands before the decoder: notes which files are begun, and holds back those that a test has named."""

    def __init__(self) -> None:
        self.begun: list[bytes] = []
        self.held: set[bytes] = set()
        self.is_open = threading.Event()
        self._decode = decode.decode_image

    def decode(self, item: Any, index: int) -> Any:
        self.begun.append(item.data)
        if item.data in self.held:
            assert self.is_open.wait(SECONDS), "the test has forgotten to open the gate"
        return self._decode(item, index)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    one = Gate()
    monkeypatch.setitem(decode._DECODERS, "image", one.decode)
    yield one
    one.is_open.set()


class Clock:
    """What deadlines go by instead of the machine's clock."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    one = Clock()
    monkeypatch.setattr(requests, "time", SimpleNamespace(monotonic=one.monotonic))
    return one


class Service:
    """A preprocess service with one thread for media, so that items are ready one after the other."""

    def __init__(self, pipeline: Pipeline, client: AsyncClient, stub: Any) -> None:
        self.pipeline, self.client, self.stub = pipeline, client, stub

    def process(self, files: list[bytes]) -> Any:
        """The call, which the test reads by hand."""
        prompt = Prompt("<image>" * len(files), [Media(file) for file in files]).to_proto()
        return self.stub.Process(preprocess_pb2.ProcessRequest(prompt=prompt), timeout=SECONDS)

    async def check_idle(self) -> None:
        """Nothing is pending, and no task of the pipeline is left."""
        await eventually(lambda: not self.pipeline.num_pending)
        await eventually(lambda: not [task for task in asyncio.all_tasks() if is_of_pipeline(task)])


def is_of_pipeline(task: asyncio.Task[Any]) -> bool:
    return getattr(task.get_coro(), "__qualname__", "").startswith(f"{Pipeline.__name__}.")


@pytest_asyncio.fixture
async def service(checkpoint_dir: Path, checkpoint: Checkpoint, gate: Gate) -> AsyncIterator[Service]:
    """Whatever a test has left at the gate is let through before the service stops."""
    async with served(checkpoint_dir, StandInExecutor(checkpoint.fingerprint), media_threads=1) as (server, client):
        assert server._pipeline is not None
        async with grpc.aio.insecure_channel(server.address) as channel:
            try:
                yield Service(server._pipeline, client, preprocess_pb2_grpc.PreprocessServiceStub(channel))
            finally:
                gate.is_open.set()


def files(count: int) -> list[bytes]:
    return [encoded(picture(8 + index, 9)) for index in range(count)]


async def read_until_first_item(call: Any) -> None:
    assert (await call.read()).HasField("plan")
    chunk = (await call.read()).chunk
    assert (chunk.item_index, len(chunk.data)) == (0, TENSOR_BYTES)


async def test_what_has_not_begun_when_the_client_goes_away_is_not_worked_on(service: Service, gate: Gate) -> None:
    """The first item has been sent, the second is being decoded, the others wait for the thread that does it."""
    *pictures, another = files(5)
    gate.held = {pictures[1]}
    call = service.process(pictures)
    await read_until_first_item(call)
    await eventually(lambda: gate.begun == pictures[:2])
    call.cancel()
    await service.check_idle()
    gate.is_open.set()
    # The thread takes its work in order: when this is done, it has seen all that came before.
    processed = await service.client.process(Prompt("<image>", [Media(another)]))
    assert len(processed.tensors[0]["pixel_values"]) == TENSOR_BYTES
    assert gate.begun == [*pictures[:2], another]


async def test_a_deadline_that_passes_between_two_items(service: Service, gate: Gate, clock: Clock) -> None:
    """The second item is ready only afterwards, and is not sent."""
    *pictures, another = files(3)
    gate.held = {pictures[1]}
    call = service.process(pictures)
    await read_until_first_item(call)
    await eventually(lambda: gate.begun == pictures[:2])
    clock.now += SECONDS
    gate.is_open.set()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert caught.value.details() == "the deadline passed before stage 'transfer'"
    assert facts(caught.value)["stage"] == "transfer"
    await service.check_idle()
    assert (await service.client.process(Prompt("<image>", [Media(another)]))).tensors


async def test_a_deadline_that_passes_between_two_pieces_of_one_tensor(
    service: Service, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the test is the consumer: the next piece is made when it asks for it."""
    monkeypatch.setattr(framing, "CHUNK_BYTES", 1000)
    prompt = requests.Prompt("<image>", (requests.Media("image", files(1)[0]),))
    async with aclosing(service.pipeline.process(prompt, Deadline(clock.now + 10))) as pieces:
        assert isinstance(await anext(pieces), Plan)
        clock.now += 9
        piece = await anext(pieces)
        assert isinstance(piece, TensorPiece)
        assert (piece.offset, len(piece.data)) == (0, 1000)
        clock.now += 2
        with pytest.raises(DeadlineError) as caught:
            await anext(pieces)
    assert caught.value.metadata["stage"] == "transfer"
    await service.check_idle()


def facts(error: grpc.aio.AioRpcError) -> dict[str, str]:
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return dict(info.metadata)
