"""The life of a service as a process of its own."""

from __future__ import annotations

import asyncio
import gc
import os
import signal

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from diptych.service.lifecycle import GrpcFrame, run_service


class Booting:
    """A service that is stopped as soon as it serves; `kept` is part of what it has made by then."""

    address = "127.0.0.1:1"

    def __init__(self) -> None:
        self.kept: list[object] = []
        self.is_looked_at: bool | None = None

    async def start(self) -> None:
        self.kept = [[self]]

    async def drain(self, grace: float) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def wait_failed(self) -> str:
        self.is_looked_at = any(one is self.kept for one in gc.get_objects())
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()
        raise AssertionError


def test_what_a_boot_has_made_is_not_looked_through_for_garbage(capsys: pytest.CaptureFixture[str]) -> None:
    """It is hundreds of thousands of objects, and requests wait as long."""
    service = Booting()
    try:
        assert run_service(lambda: service, 1.0) == 0
    finally:
        gc.unfreeze()
    assert capsys.readouterr().out == "listening on 127.0.0.1:1\n"
    assert service.is_looked_at is False


async def test_watchers_hear_that_a_server_stops_before_it_is_gone() -> None:
    """Of the service and of the process: their streams end behind it."""
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    frame = GrpcFrame("127.0.0.1", 0, "a.Service")
    async with grpc.aio.insecure_channel(await frame.start()) as channel:
        await frame.set_serving(True)
        stub = health_pb2_grpc.HealthStub(channel)
        watched = [stub.Watch(health_pb2.HealthCheckRequest(service=name), timeout=60) for name in ("a.Service", "")]
        assert [(await watch.read()).status for watch in watched] == [serving, serving]
        await frame.stop(30.0)
        assert [(await watch.read()).status for watch in watched] == [not_serving, not_serving]


async def test_a_taken_port_is_told_with_what_to_do() -> None:
    first = GrpcFrame("127.0.0.1", 0, "a.Service")
    address = await first.start()
    second = GrpcFrame("127.0.0.1", int(address.rpartition(":")[2]), "a.Service")
    with pytest.raises(OSError, match=f"^cannot listen on {address}: ") as caught:
        await second.start()
    assert str(caught.value).endswith("; if another program has the port, take another (0: any free one)")
    await first.stop(0)
