"""What a boot's benchmark promises of its conditions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.boot import environment, is_compiled


def test_boots_keep_what_python_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment says; and it is told whether it was kept."""
    (tmp_path / "a_package").mkdir()
    (tmp_path / "a_package" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    command = [sys.executable, "-c", "import a_package"]
    subprocess.run(command, check=True)
    assert not is_compiled("a_package")
    subprocess.run(command, env=environment(tmp_path), check=True)
    assert is_compiled("a_package")


def test_a_package_that_is_not_there_is_not_compiled() -> None:
    assert not is_compiled("no_such_package")
