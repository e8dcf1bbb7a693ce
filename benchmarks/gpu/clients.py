"""Clients of the services in processes of their own: many `Generate` calls at once, or stand-ins on one shared stream.

One Python process reads some thousand messages in a second, so there are several; all begin at the same moment.
"""

from __future__ import annotations

import asyncio
import io
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from PIL import Image

from diptych.service.lifecycle import CHANNEL_OPTIONS
from diptych.v1 import preprocess_pb2, preprocess_pb2_grpc, tensor_pb2

_PLANNERS: dict[Path, Any] = {}
FIRST_WORD, LAST_WORD = 40, 300
"""No number begins with a 3: `w3` is the tokenizer's unknown token, which splits every word that begins with it."""
READY_SECONDS = 120.0


@dataclass(frozen=True)
class Job:
    """What one client process asks: `count` requests at once of `address`, each with a picture of its own."""

    kind: str
    address: str
    model: Path
    count: int
    side: int
    text_tokens: int
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Outcome:
    """On the clock that a machine's processes share: when it began, every first token, and the end."""

    began: float
    first_tokens: list[float]
    ended: float
    num_tokens: int


class Clients:
    """Client processes that stay, so that what they import is imported once."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._clients: list[tuple[Any, Connection]] = []
        self._start()

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(self, jobs: Sequence[Job], limit: float) -> list[Outcome]:
        """A job per process, all at the same time; RuntimeError if one fails or takes longer than `limit` seconds."""
        connections = [connection for _, connection in self._clients][: len(jobs)]
        try:
            for job, connection in zip(jobs, connections, strict=True):
                connection.send(job)
            for connection in connections:
                _expect(connection, READY_SECONDS)
            for connection in connections:
                connection.send("go")
            until = time.monotonic() + limit
            return [_expect(connection, until - time.monotonic()) for connection in connections]
        except Exception:
            self._stop()
            self._start()  # the others are still in the middle of it
            raise

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for _ in range(self._count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_client, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._clients.append((process, ours))

    def _stop(self) -> None:
        for process, connection in self._clients:
            process.kill()
            process.join()
            connection.close()
        self._clients.clear()


def _expect(connection: Connection, seconds: float) -> Any:
    if not connection.poll(max(seconds, 0)):
        raise RuntimeError("a client process took too long")
    message = connection.recv()
    if isinstance(message, Exception):
        raise RuntimeError(f"a client failed: {message}")
    return message


def _client(connection: Connection) -> None:
    """Jobs one after the other."""
    while True:
        job: Job = connection.recv()
        try:
            asyncio.run(_KINDS[job.kind](job, connection))
        except Exception as error:  # whoever waits for it has to know
            connection.send(RuntimeError(f"{type(error).__name__}: {error}"[:500]))


def words(rng: np.random.Generator, count: int) -> str:
    """Text of so many tokens, for the tokenizer of `benchmarks.gpu.models`."""
    return " ".join(f"w{number}" for number in rng.integers(FIRST_WORD, LAST_WORD, count))


def pictures(rng: np.random.Generator, count: int, side: int) -> list[bytes]:
    """JPEG files of smooth noise."""
    files = []
    for _ in range(count):
        coarse = rng.integers(0, 256, (side // 16 + 1, side // 16 + 1, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


async def generate(job: Job, connection: Connection) -> None:
    """JPEG files through `Generate`."""
    rng = np.random.default_rng(job.seed)
    files = pictures(rng, job.count, job.side)
    requests = [_generate_request(file, words(rng, job.text_tokens), job.max_tokens) for file in files]
    async with grpc.aio.insecure_channel(job.address, options=CHANNEL_OPTIONS) as channel:
        await asyncio.wait_for(channel.channel_ready(), 30)
        stub = preprocess_pb2_grpc.PreprocessServiceStub(channel)

        async def ask(request: preprocess_pb2.GenerateRequest) -> tuple[float, int]:
            first, count = 0.0, 0
            async for response in stub.Generate(request):
                if response.token_ids and not count:
                    first = time.monotonic()
                count += len(response.token_ids)
            return first, count

        await _together(connection, [lambda r=request: ask(r) for request in requests], job.max_tokens)


def _generate_request(file: bytes, text: str, max_tokens: int) -> preprocess_pb2.GenerateRequest:
    media = preprocess_pb2.Media(modality=tensor_pb2.MODALITY_IMAGE, data=file)
    return preprocess_pb2.GenerateRequest(
        prompt=preprocess_pb2.Prompt(text=f"<image> {text}", media=[media]),
        sampling=tensor_pb2.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True),
    )


async def stand_ins(job: Job, connection: Connection) -> None:
    """Ready tensors on one `Execute` stream, by the preprocess service's own sender."""
    from preprocess_service.executor_client.request import Completed, MissingItems, TokenOutput
    from preprocess_service.executor_client.stream import ExecutorStream

    planned = _plan(job)
    async with grpc.aio.insecure_channel(job.address, options=CHANNEL_OPTIONS) as channel:
        stream = ExecutorStream(channel, job.address, closes_when_idle=False, on_sent=lambda _: None)

        async def ask(one: Any) -> tuple[float, int]:
            request, first, count, is_done = stream.start(one.start), 0.0, 0, False
            while not is_done:
                for event in await request.next_events():
                    if isinstance(event, TokenOutput):
                        first = first or time.monotonic()
                        count += 1
                    elif isinstance(event, MissingItems):
                        for index in event.indices:
                            request.send_tensor(index, 0, one.tensors[index])
                    is_done = is_done or isinstance(event, Completed)
            request.release()
            return first, count

        await _together(connection, [lambda p=one: ask(p) for one in planned], job.max_tokens)
        await stream.close()


def _plan(job: Job) -> list[Any]:
    """Starts and tensors, as the preprocess service would make them."""
    from registry import MediaInfo, MediaItem
    from registry.families import open_family
    from registry.fingerprint import fingerprint
    from tests.executor_service.peer import Planner

    if job.model not in _PLANNERS:
        family = open_family(job.model)
        _PLANNERS[job.model] = Planner(family, fingerprint(family).digest)
    planner, rng = _PLANNERS[job.model], np.random.default_rng(job.seed)
    size = (job.side, job.side)
    planned = []
    for _ in range(job.count):
        picture = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        media = [MediaItem(MediaInfo.image(*size), picture)]
        text = f"<image> {words(rng, job.text_tokens)}"
        planned.append(planner.plan_items(text, media, max_tokens=job.max_tokens))
    return planned


async def _together(connection: Connection, asks: Sequence[Any], max_tokens: int) -> None:
    """Say that everything is ready, wait for the word, ask all at once, and report."""
    connection.send("ready")
    await asyncio.to_thread(connection.recv)
    began = time.monotonic()
    answers = await asyncio.gather(*(ask() for ask in asks))
    ended = time.monotonic()
    counts = [count for _, count in answers]
    if set(counts) != {max_tokens}:
        raise RuntimeError(f"answers have {sorted(set(counts))} tokens instead of {max_tokens}")
    connection.send(Outcome(began, [first for first, _ in answers], ended, sum(counts)))


_KINDS = {"generate": generate, "stand-ins": stand_ins}
