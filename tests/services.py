"""The real services for tests: the lifecycle function production uses, on loopback ports, in a thread's event loop.

The executor's engine is a process of its own, as always; it proves its blocks and queues after every step.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from diptych.service.lifecycle import CHANNEL_OPTIONS, Service, running
from diptych.v1 import executor_pb2, executor_pb2_grpc, preprocess_pb2_grpc
from executor_service.server import ExecutorServer
from executor_service.settings import ExecutorSettings
from preprocess_service.server import PreprocessServer
from preprocess_service.settings import PreprocessSettings

EXECUTOR_DEFAULTS = {"check_integrity": True, "dtype": "float64", "limit_mm_per_prompt": {"image": 4}}
PREPROCESS_DEFAULTS = {"limit_mm_per_prompt": {"image": 4}}


@contextlib.contextmanager
def service_thread(make: Callable[[], Service]) -> Iterator[tuple[Any, asyncio.AbstractEventLoop]]:
    """Run a service in a thread of its own; yields it, started, and its loop."""
    started: Future[tuple[Any, asyncio.AbstractEventLoop]] = Future()
    stop_requested: list[asyncio.Event] = []

    async def main() -> None:
        stop = asyncio.Event()
        stop_requested.append(stop)
        async with running(make()) as service:
            started.set_result((service, asyncio.get_running_loop()))
            await stop.wait()

    def body() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    thread = threading.Thread(target=body)
    thread.start()
    try:
        service, loop = started.result(120)
        yield service, loop
        loop.call_soon_threadsafe(stop_requested[0].set)
    finally:
        if started.done() and not started.exception():
            with contextlib.suppress(RuntimeError):
                started.result()[1].call_soon_threadsafe(stop_requested[0].set)
        thread.join(60)


@dataclass
class Stack:
    """Both services on one checkpoint."""

    checkpoint: Path
    executor: ExecutorServer
    preprocess: PreprocessServer
    executor_loop: asyncio.AbstractEventLoop
    channel: grpc.Channel
    executor_channel: grpc.Channel

    @property
    def preprocess_address(self) -> str:
        return self.preprocess.address

    @property
    def executor_address(self) -> str:
        return self.executor.address

    @property
    def stub(self) -> preprocess_pb2_grpc.PreprocessServiceStub:
        return preprocess_pb2_grpc.PreprocessServiceStub(self.channel)

    @property
    def executor_stub(self) -> executor_pb2_grpc.ExecutorServiceStub:
        return executor_pb2_grpc.ExecutorServiceStub(self.executor_channel)

    def check_idle(self) -> None:
        """Everything is free again: no request, no block, no byte of the arena."""
        wait_idle(self.executor_channel, self.executor, self.executor_loop)


def wait_idle(
    channel: grpc.Channel, executor: ExecutorServer, loop: asyncio.AbstractEventLoop, patience: float = 10.0
) -> None:
    """Fails unless the executor comes to rest with every resource free and whole."""
    stub = executor_pb2_grpc.ExecutorServiceStub(channel)
    until = time.monotonic() + patience
    busy: tuple[int, ...] = (1,)

    async def check_front() -> int:
        executor.front.check_integrity()
        return executor.front.num_pinned_bytes

    # Messages of a stream that was dropped may still be on their way, so idle once is not yet at rest.
    while any(busy) and time.monotonic() < until:
        call = stub.WatchLoad(executor_pb2.WatchLoadRequest())
        load = next(call)
        call.cancel()
        pinned = asyncio.run_coroutine_threadsafe(check_front(), loop).result(10)
        busy = (load.num_running, load.num_waiting, load.num_receiving, load.num_used_blocks, pinned)
        time.sleep(0.02)
    assert not any(busy), f"running, waiting, receiving, blocks, pinned bytes: {busy}"


@contextlib.contextmanager
def stack(
    checkpoint: Path, executor: dict[str, Any] | None = None, preprocess: dict[str, Any] | None = None
) -> Iterator[Stack]:
    """Executor, preprocess service and channels to both; everything stops at the end."""
    executor_settings = ExecutorSettings(model=checkpoint, port=0, **{**EXECUTOR_DEFAULTS, **(executor or {})})
    with service_thread(lambda: ExecutorServer(executor_settings)) as (executor_server, loop):
        values = {**PREPROCESS_DEFAULTS, "executor": executor_server.address, **(preprocess or {})}
        preprocess_settings = PreprocessSettings(model=checkpoint, port=0, **values)
        with (
            service_thread(lambda: PreprocessServer(preprocess_settings)) as (preprocess_server, _),
            grpc.insecure_channel(preprocess_server.address, options=CHANNEL_OPTIONS) as channel,
            grpc.insecure_channel(executor_server.address, options=CHANNEL_OPTIONS) as executor_channel,
        ):
            yield Stack(checkpoint, executor_server, preprocess_server, loop, channel, executor_channel)
