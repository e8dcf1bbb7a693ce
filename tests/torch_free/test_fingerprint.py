"""Environments that differ in library versions, and in having torch, agree on what a checkpoint is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_checkpoint import make_checkpoint

SCRIPT = Path(__file__).with_name("print_fingerprint.py")


def fingerprint(python: str | Path, model: Path) -> dict[str, object]:
    done = subprocess.run([python, SCRIPT, model], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("fixture", ["tiny_checkpoint", "demo_model"])
def test_the_fingerprint_here_is_that_of_the_develop_environment(fixture, develop_python, request):
    model = request.getfixturevalue(fixture)
    here, there = fingerprint(sys.executable, model), fingerprint(develop_python, model)
    assert here["parts"] == there["parts"]
    assert here["digest"] == there["digest"]
    assert here["probes"] == pytest.approx(there["probes"], abs=1e-3)


def test_another_image_size_has_another_fingerprint(tiny_checkpoint, tmp_path):
    other = make_checkpoint(tmp_path / "other", image_size=42)
    assert fingerprint(sys.executable, other)["digest"] != fingerprint(sys.executable, tiny_checkpoint)["digest"]
