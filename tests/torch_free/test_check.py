"""`diptych check` without torch: the registry's stages run, the executor's say why they do not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

DIPTYCH = Path(sys.prefix) / "bin" / "diptych"


def test_check_runs_what_needs_no_torch(tiny_checkpoint, tmp_path):
    command = [DIPTYCH, "check", "--model", tiny_checkpoint, "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    stages = {stage["name"]: stage for stage in json.loads(done.stdout)["stages"]}
    for name in ("hooks", "layout and mapper", "maximum tokens", "dummy data", "fingerprint"):
        assert stages[name].get("ok") is True, stages[name]
    for name in ("executor model", "features", "forward"):
        assert stages[name]["skipped"] is True
        assert stages[name]["detail"] == "torch is not installed"
