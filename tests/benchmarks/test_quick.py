"""Every benchmark still runs: once, small, with a result that says where it comes from. Its figures mean nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("name", ["host", "token_stream", "shared_stream", "telemetry", "split", "served"])
def test_quick(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--output", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / f"{name}.json").read_text("utf-8"))
    assert result["name"] == name
    assert result["flags"]["quick"] is True
    assert {"date", "commit", "machine", "versions", "load_average", "figures"} <= result.keys()
