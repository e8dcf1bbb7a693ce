"""One lifecycle for every service: start until SERVING, serve, drain, stop.

The commands and the tests run services through these functions alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import sys
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import Final, Protocol

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from diptych.service import background
from diptych.service.errors import DiptychError, UnavailableError
from diptych.service.interceptor import ErrorInterceptor, HandlerCache
from diptych.service.telemetry import Telemetry
from diptych.service.telemetry.interceptor import TelemetryInterceptor
from diptych.wire.bounds import MAX_TEXT_BYTES

LOG = logging.getLogger("diptych.service")
MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024
SERVER_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),
    # Clients may ping every 10 s on an idle connection; anything faster is dropped by grpc's strikes.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 60_000),
)
CHANNEL_OPTIONS: Final = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)


class Service(Protocol):
    """What a service implements; `serve` drives it."""

    async def start(self) -> None:
        """Boot and begin to serve; returns when SERVING."""

    async def drain(self, grace: float) -> None:
        """Refuse new requests and give running ones `grace` seconds."""

    async def stop(self) -> None:
        """Free everything; called once, whatever happened before."""

    async def wait_failed(self) -> str:
        """Returns a reason only if the service can serve no longer."""

    @property
    def address(self) -> str:
        """HOST:PORT it listens on, once started."""


class GrpcFrame:
    """A grpc.aio server with health, reflection, telemetry and our error interceptor.

    `unwatched` are methods that last as long as their peer, see TelemetryInterceptor; `debug` adds channelz.
    Texts of more than `max_text_bytes` are not read.
    """

    def __init__(
        self,
        host: str,
        port: int,
        service_name: str,
        telemetry: Telemetry | None = None,
        unwatched: Collection[str] = (),
        debug: bool = False,
        max_text_bytes: int = MAX_TEXT_BYTES,
    ) -> None:
        self._host, self._port = host, port
        self._service_name = service_name
        self.health = health.aio.HealthServicer()
        watched = TelemetryInterceptor(telemetry or Telemetry(), unwatched)
        interceptors = (HandlerCache(), watched, ErrorInterceptor(max_text_bytes))
        self.server = grpc.aio.server(interceptors=interceptors, options=SERVER_OPTIONS)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        names = [service_name, health.SERVICE_NAME, reflection.SERVICE_NAME]
        if debug:
            names.append(_add_channelz(self.server))
        reflection.enable_server_reflection(names, self.server)

    async def start(self) -> str:
        """Bind and listen; returns HOST:PORT. OSError if the port is taken."""
        await self.set_serving(False)
        try:
            bound = self.server.add_insecure_port(_join(self._host, self._port))
        except RuntimeError as error:
            address = _join(self._host, self._port)
            raise OSError(
                f"cannot listen on {address}: {error}; if another program has the port, take another (0: any free one)"
            ) from error
        await self.server.start()
        await self.health.set("", health_pb2.HealthCheckResponse.SERVING)
        return _join(self._host, bound)

    async def set_serving(self, serving: bool) -> None:
        """Health of the service by its name; "" says only that the process serves."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        await self.health.set(self._service_name, status)

    async def stop(self, grace: float | None) -> None:
        """NOT_SERVING everywhere, then stop: running calls get `grace` seconds."""
        await self.health.enter_graceful_shutdown()
        await self.server.stop(grace)


@contextlib.asynccontextmanager
async def running(service: Service, grace: float = 0.0) -> AsyncIterator[Service]:
    """Start a service, drain and stop it at the end."""
    try:
        await service.start()
        yield service
    finally:
        try:
            await service.drain(grace)
        finally:
            await service.stop()


async def serve(service: Service, grace: float, announce: Callable[[str], None] | None = None) -> int:
    """Run a service until SIGINT, SIGTERM or its failure; returns the exit code.

    0 after SIGTERM, 130 after SIGINT (Ctrl-C), 1 after a failure. A SIGINT after either of them takes what is left of
    the grace period away and leaves the code as it is.
    """
    stopped = _Stopped()
    gc.disable()  # to look through modules while they are imported takes a fifth of that time, and finds nothing
    with _signals(stopped):
        start = asyncio.create_task(service.start())
        stop = asyncio.create_task(stopped.wait())
        try:
            await asyncio.wait((start, stop), return_when=asyncio.FIRST_COMPLETED)
            if not start.done():
                return stopped.exit_code
            start.result()
            _keep_what_is_there()
            (announce or _announce)(service.address)
            return 1 if await _fails_before_stop(service, stop) else stopped.exit_code
        finally:
            gc.enable()
            start.cancel()
            stop.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await start
            await _drain(service, grace, stopped)
            await service.stop()


async def _drain(service: Service, grace: float, stopped: _Stopped) -> None:
    """Once nobody wants to wait any longer, running requests are ended as at the end of the grace period."""
    drain, hurry = asyncio.create_task(service.drain(grace)), asyncio.create_task(stopped.hurry.wait())
    await asyncio.wait((drain, hurry), return_when=asyncio.FIRST_COMPLETED)
    hurry.cancel()
    if drain.done():
        drain.result()
        return
    LOG.info("stopping: not draining any longer")
    drain.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await drain
    await service.drain(0.0)


async def _fails_before_stop(service: Service, stop: asyncio.Task[bool]) -> bool:
    failed = asyncio.create_task(service.wait_failed())
    await asyncio.wait((stop, failed), return_when=asyncio.FIRST_COMPLETED)
    if failed.done() and not failed.cancelled():
        LOG.error("stopping: %s", failed.result())
        return True
    failed.cancel()
    LOG.info("stopping: draining")
    return False


def run_service(make: Callable[[], Service], grace: float) -> int:
    """Make and run a service in a fresh event loop; errors at boot go to standard error as `STATUS_NAME: message`.

    A boot that is given up while it imports ends the process here and now.
    """
    code = _run_to_end(make, grace)
    if background.is_busy():
        background.end_process(code)
    return code


def _run_to_end(make: Callable[[], Service], grace: float) -> int:
    async def main() -> int:
        return await serve(make(), grace)

    try:
        return asyncio.run(main())
    except DiptychError as error:
        details = "".join(f"\n  {name}: {value}" for name, value in error.metadata.items())
        print(f"{error.code.name}: {error.message}{details}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"UNAVAILABLE: {error}", file=sys.stderr)
        return 1


class _Stopped(asyncio.Event):
    """Set by the first signal; knows the exit code that it asks for, and whether another one asks for hurry.

    SIGTERM does not: a supervisor may send one to the whole process group and whoever started this process another.
    """

    exit_code = 0

    def __init__(self) -> None:
        super().__init__()
        self.hurry = asyncio.Event()

    def set_by(self, number: signal.Signals) -> None:
        is_interrupt = number == signal.SIGINT
        if not self.is_set():
            self.exit_code = 130 if is_interrupt else 0
        elif is_interrupt:
            self.hurry.set()
        self.set()


def _add_channelz(server: grpc.aio.Server) -> str:
    """Returns the service's name."""
    try:
        from grpc_channelz.v1 import channelz, channelz_pb2
    except ImportError as error:
        raise UnavailableError("--debug needs the package grpcio-channelz", stage="boot") from error
    channelz.add_channelz_servicer(server)
    name: str = channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name
    return name


@contextlib.contextmanager
def _signals(stopped: _Stopped, signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)):  # type: ignore[no-untyped-def]
    loop = asyncio.get_running_loop()
    for number in signals:
        loop.add_signal_handler(number, stopped.set_by, number)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def _keep_what_is_there() -> None:
    """Modules and checkpoints live as long as the process.

    To look through them for garbage takes half a second, in which every request would wait.
    """
    gc.freeze()
    gc.enable()


def _announce(address: str) -> None:
    print(f"listening on {address}", flush=True)


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
