"""A real executor for the tests of one module, and honest requests for it.

A module says with which settings, by a fixture of its own named `executor_settings`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from diptych.service.lifecycle import CHANNEL_OPTIONS
from executor_service.server import ExecutorServer
from executor_service.settings import ExecutorSettings
from registry.fingerprint import fingerprint
from tests.executor_service.peer import Planner
from tests.services import EXECUTOR_DEFAULTS, service_thread, wait_idle


@pytest.fixture(scope="module")
def executor_settings() -> dict[str, Any]:
    """Beyond the tests' defaults: none."""
    return {}


@pytest.fixture(scope="module")
def server(checkpoint, executor_settings) -> Iterator[tuple]:
    """The executor and its event loop."""
    settings = ExecutorSettings(model=checkpoint, port=0, **EXECUTOR_DEFAULTS, **executor_settings)
    with service_thread(lambda: ExecutorServer(settings)) as (executor, loop):
        yield executor, loop


@pytest.fixture
def channel(server) -> Iterator[grpc.Channel]:
    """A fresh connection; after every test everything must be free again."""
    executor, loop = server
    with grpc.insecure_channel(executor.address, options=CHANNEL_OPTIONS) as channel:
        yield channel
        wait_idle(channel, executor, loop)


@pytest.fixture
def planner(server) -> Planner:
    """Makes honest requests for it."""
    family = server[0].front.family
    return Planner(family, fingerprint(family).digest)
