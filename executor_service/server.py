"""The executor service's lifecycle: boot the engine, serve, drain, stop."""

from __future__ import annotations

import asyncio
import importlib
import logging
import time
from dataclasses import replace
from functools import partial
from typing import Final

from diptych.service.background import in_background
from diptych.service.errors import UnavailableError
from diptych.service.lifecycle import GrpcFrame
from diptych.service.settings import describe
from diptych.service.telemetry import Telemetry
from executor_service.front.engine_link import ENGINE_MODULE
from executor_service.front.front import Front
from executor_service.imports import lean_imports
from executor_service.servicer import SERVICE_NAME, ExecutorServicer, add_to_server
from executor_service.settings import ExecutorSettings
from registry.errors import RegistryError
from registry.families import open_family
from registry.family import ModelFamily

LOG = logging.getLogger("diptych.executor")
UNWATCHED: Final = ("WatchLoad",)
"""It lasts as long as its peer."""
IMPORTED: Final = ("transformers.models.auto.tokenization_auto", "transformers.models.auto.image_processing_auto")
"""What reading a checkpoint imports, which without care is more than an engine does."""


class ExecutorServer:
    """A `Service`: see diptych.service.lifecycle.

    `engine_module` is what runs in the engine process; `began` is when the boot did, on `time.monotonic()`: by default
    now.
    """

    def __init__(
        self, settings: ExecutorSettings, engine_module: str = ENGINE_MODULE, began: float | None = None
    ) -> None:
        self.settings = settings
        self._engine_module = engine_module
        self._began = time.monotonic() if began is None else began
        self._frame: GrpcFrame | None = None
        self._front: Front | None = None
        self._telemetry = Telemetry(settings.telemetry("diptych-executor"))
        self._address = ""

    @property
    def address(self) -> str:
        """HOST:PORT it listens on."""
        return self._address

    @property
    def metrics_address(self) -> str | None:
        """HOST:PORT of the Prometheus endpoint, if there is one."""
        return self._telemetry.metrics_address

    @property
    def front(self) -> Front:
        """The front, for tests that look inside."""
        assert self._front is not None
        return self._front

    async def start(self) -> None:
        """Start the engine, listen (health NOT_SERVING) while it boots, become SERVING."""
        LOG.info("settings", extra=describe(self.settings))
        settings = self.settings
        config = replace(settings.engine_config, began=self._began)
        front = self._front = Front(
            config,
            int(settings.media_memory),
            settings.max_requests,
            settings.receive_timeout,
            self._telemetry,
            self._engine_module,
        )
        front.launch()
        self._frame = GrpcFrame(settings.host, settings.port, SERVICE_NAME, self._telemetry, UNWATCHED, settings.debug)
        add_to_server(ExecutorServicer(front, settings.model_name), self._frame.server)
        self._address = await self._frame.start()
        # Reading the checkpoint imports what the engine imports meanwhile; the loop has the engine to listen to.
        await front.start(await in_background(partial(_bind_family, settings)))
        self._log_ledger(front)
        await self._frame.set_serving(True)
        front.boot_log.end(self._began)

    async def drain(self, grace: float) -> None:
        """NOT_SERVING first; then running requests get `grace` seconds."""
        if self._frame is not None and self._front is not None:
            await self._frame.set_serving(False)
            await self._front.drain(grace)

    async def stop(self) -> None:
        """Close streams, end the engine, free the arena."""
        if self._frame is not None:
            await self._frame.stop(1.0)
        if self._front is not None:
            await self._front.stop()
        await asyncio.to_thread(self._telemetry.close)

    async def wait_failed(self) -> str:
        """Returns when the engine has died; health is NOT_SERVING by then."""
        reason = await self.front.wait_failed()
        assert self._frame is not None
        await self._frame.set_serving(False)
        return reason

    @staticmethod
    def _log_ledger(front: Front) -> None:
        ledger = front.booted.ledger
        LOG.info("memory ledger", extra=dict(vars(ledger)))


def _bind_family(settings: ExecutorSettings) -> ModelFamily:
    """Also what admission will ask it for, so that nothing of it is left to do when the engine has booted."""
    with lean_imports():
        for module in IMPORTED:
            importlib.import_module(module)
    try:
        family = open_family(settings.model, settings.limits, settings.plugin)
        _ = family.feature_token_ids
        return family
    except RegistryError as error:
        raise UnavailableError(str(error), stage="boot") from error
