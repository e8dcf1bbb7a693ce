"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services import Stack, stack

DEMO_MODEL = Path(__file__).parent.parent / "demo" / "model"


@pytest.fixture(scope="module")
def served_demo() -> Iterator[Stack]:
    """Both services on the demo model; checked to be idle at the end of the module."""
    with stack(DEMO_MODEL, executor={"dtype": "float32"}) as services:
        yield services
        services.check_idle()
