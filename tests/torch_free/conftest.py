"""Fixtures of the tests that run without torch."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

# In .venv, which has torch, nothing here is collected; without torch, collecting nothing would be an error.
collect_ignore_glob = ["test_*.py"] if find_spec("torch") else []

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA-1.5 checkpoint without weights: all that the preprocess service reads."""
    from tiny_checkpoint import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model."""
    path = ROOT / "demo" / "model"
    if not (path / "config.json").is_file():
        pytest.skip("no demo model")
    return path


@pytest.fixture(scope="session")
def develop_python() -> Path:
    """The interpreter of .venv, with torch and versions of its own."""
    if "DEVELOP_PYTHON" not in os.environ:
        pytest.skip("DEVELOP_PYTHON does not name the interpreter of .venv")
    return Path(os.environ["DEVELOP_PYTHON"])
