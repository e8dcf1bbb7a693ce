"""The preprocess service's lifecycle: read the checkpoint, listen, find executors, serve, drain, stop."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from diptych.service.background import in_background
from diptych.service.errors import InvalidInputError
from diptych.service.lifecycle import GrpcFrame
from diptych.service.settings import describe
from diptych.service.telemetry import Telemetry
from diptych.v1.preprocess_pb2_grpc import add_PreprocessServiceServicer_to_server
from diptych.wire.bounds import MAX_TEXT_BYTES
from preprocess_service.executor_client import ExecutorPool
from preprocess_service.media.decode import MediaWorkers
from preprocess_service.pipeline import Pipeline
from preprocess_service.planning import Checkpoint, Planner
from preprocess_service.reports import PreprocessReports
from preprocess_service.servicer import PreprocessServicer
from preprocess_service.settings import PreprocessSettings
from registry.errors import RegistryError

LOG = logging.getLogger("diptych.preprocess")
SERVICE_NAME: Final = "diptych.v1.PreprocessService"


class PreprocessServer:
    """Implements `diptych.service.lifecycle.Service`.

    Health: "" is SERVING as soon as the process listens, the service's own name only while at least one
    compatible executor is ready.
    """

    def __init__(self, settings: PreprocessSettings) -> None:
        self._settings = settings
        self._telemetry = Telemetry(settings.telemetry("diptych-preprocess"))
        self._frame = GrpcFrame(
            settings.host, settings.port, SERVICE_NAME, self._telemetry, debug=settings.debug,
            max_text_bytes=max(MAX_TEXT_BYTES, settings.max_prompt_bytes),
        )  # fmt: skip
        self._address = ""
        self._executors: ExecutorPool | None = None
        self._media: MediaWorkers | None = None
        self._pipeline: Pipeline | None = None
        self._is_draining = False
        self._health_tasks: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        """HOST:PORT it listens on, once started."""
        return self._address

    @property
    def metrics_address(self) -> str | None:
        """HOST:PORT of the Prometheus endpoint, if there is one."""
        return self._telemetry.metrics_address

    async def start(self) -> None:
        """Returns when requests can be answered: it listens and the first compatible executor is found."""
        LOG.info("settings", extra=describe(self._settings))
        checkpoint = await in_background(self._read_checkpoint)
        servicer = self._assemble(checkpoint)
        add_PreprocessServiceServicer_to_server(servicer, self._frame.server)
        self._address = await self._frame.start()
        assert self._executors is not None
        LOG.info("waiting for an executor at %s", ", ".join(self._settings.executor))
        await self._executors.wait_ready()
        await self._frame.set_serving(bool(self._executors.ready))

    async def drain(self, grace: float) -> None:
        """Refuse new requests and give running ones `grace` seconds."""
        self._is_draining = True
        if self._pipeline is not None:
            await self._frame.set_serving(False)
            await self._pipeline.drain(grace)

    async def stop(self) -> None:
        """End everything that is still there."""
        await self._frame.stop(0)
        if self._executors is not None:
            await self._executors.close()
        if self._media is not None:
            self._media.close()
        await asyncio.to_thread(self._telemetry.close)

    async def wait_failed(self) -> str:
        """Never: without executors it is NOT_SERVING and waits for them to come back."""
        await asyncio.Event().wait()
        raise AssertionError

    def _read_checkpoint(self) -> Checkpoint:
        try:
            return Checkpoint(self._settings.model, self._settings.plugin, self._settings.limits)
        except RegistryError as error:
            raise InvalidInputError(str(error), stage="boot") from error

    def _assemble(self, checkpoint: Checkpoint) -> PreprocessServicer:
        settings = self._settings
        executors = ExecutorPool(
            settings.executor,
            checkpoint.fingerprint,
            settings.executor_streams == "shared",
            self._settings.limits,
            self._update_health,
        )
        self._executors = executors
        self._media = MediaWorkers(checkpoint.family, settings.media_threads)
        planner = Planner(checkpoint, lambda: executors.limits, settings.max_media_bytes, settings.max_prompt_bytes)
        self._pipeline = Pipeline(checkpoint, planner, self._media, executors, settings.max_pending_requests)
        reports = PreprocessReports(self._telemetry, settings.model_name, self._pipeline, executors)
        return PreprocessServicer(settings.model_name, checkpoint, self._pipeline, executors, reports)

    def _update_health(self) -> None:
        """Called on every change among the executors, from the event loop."""
        if self._executors is None or self._is_draining:
            return
        task = asyncio.create_task(self._frame.set_serving(bool(self._executors.ready)))
        self._health_tasks.add(task)
        task.add_done_callback(self._health_tasks.discard)
