"""The life of a service as a process of its own."""

from __future__ import annotations

import asyncio
import gc
import os
import signal

import pytest

from diptych.service.lifecycle import run_service


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
