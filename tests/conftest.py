"""Fixtures for all tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.services import Stack, stack

ROOT = Path(__file__).resolve().parent.parent
DEMO_MODEL = ROOT / "demo" / "model"

# How long an example takes is the machine's affair.
hypothesis.settings.register_profile("untimed", parent=hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="module")
def served_demo() -> Iterator[Stack]:
    """Both services on the demo model; checked to be idle at the end of the module."""
    with stack(DEMO_MODEL, executor={"dtype": "float32"}) as services:
        yield services
        services.check_idle()


@pytest.fixture(scope="session")
def node_modules() -> str:
    """node_modules with the gRPC packages of tests/foreign_client, installed outside the clone."""
    if shutil.which("npm") is None:
        reason = "Node.js with npm is not installed"
        if os.environ.get("STRICT") == "1" or os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    command = [sys.executable, ROOT / "tools" / "node_packages.py", ROOT / "tests" / "foreign_client" / "package.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
