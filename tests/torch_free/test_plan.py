"""The command that needs no server, no executor and no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

DIPTYCH = Path(sys.prefix) / "bin" / "diptych"


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (40, 30), (10, 200, 30)).save(path)
    return path


@pytest.mark.parametrize("fixture", ["tiny_checkpoint", "demo_model"])
def test_plan_counts_the_tokens_of_a_picture(fixture, picture, request, tmp_path):
    model = request.getfixturevalue(fixture)
    command = [DIPTYCH, "plan", "--model", model, "--prompt", "<image>a", "--image", picture, "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    (item,) = plan["items"]
    assert item["modality"] == "image"
    assert item["length"] >= 1
    assert len(plan["prompt_token_ids"]) > item["length"]
    assert [tensor["dtype"] for tensor in item["tensors"]] == ["uint8"]
