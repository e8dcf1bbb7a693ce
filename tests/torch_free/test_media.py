"""Videos and audio without torch and without the extras that decode them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import wave
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image
from tiny_checkpoint import make_checkpoint

DIPTYCH = Path(sys.prefix) / "bin" / "diptych"
TWO_FILES = """
import numpy as np
from registry import MULTIMODAL_REGISTRY, ItemLayout, Run, SupportsMultiModal, TensorSpec

def video_layout(ctx, media):
    spec = TensorSpec("uint8", (media.num_frames, *media.size, 3))
    return ItemLayout((Run(3, media.num_frames),), {"frames": spec})

def audio_layout(ctx, media):
    spec = TensorSpec("float32", (media.num_samples,))
    return ItemLayout((Run(0, media.num_samples // 1000 + 1),), {"samples": spec})

@MULTIMODAL_REGISTRY.register_video_layout(video_layout)
@MULTIMODAL_REGISTRY.register_video_input_mapper(lambda ctx, item: {"frames": np.stack(item.data)})
@MULTIMODAL_REGISTRY.register_audio_layout(audio_layout)
@MULTIMODAL_REGISTRY.register_audio_input_mapper(lambda ctx, item: {"samples": item.data})
class LooksAndListens(SupportsMultiModal):
    executor_model = "somewhere.with_torch:Model"

    @classmethod
    def placeholder_token_id(cls, ctx, modality):
        return {"video": 3, "audio": 0}[modality]
"""
ONE_FILE = "import torch\n" + TWO_FILES.replace("(SupportsMultiModal)", "(SupportsMultiModal, torch.nn.Module)")


@pytest.fixture
def model(tmp_path) -> Path:
    path = make_checkpoint(tmp_path / "model")
    config = json.loads((path / "config.json").read_text("utf-8"))
    (path / "config.json").write_text(json.dumps({**config, "architectures": ["LooksAndListens"]}), "utf-8")
    return path


def plan(folder: Path, plugin: str, model: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    (folder / "my_plugin.py").write_text(plugin, "utf-8")
    command = [DIPTYCH, "plan", "--model", model, "--plugin", "my_plugin", "--json", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_an_animation_needs_no_extra(model, tmp_path) -> None:
    first, *others = (Image.new("RGB", (30, 20), (40 * number, 0, 0)) for number in range(3))
    first.save(tmp_path / "a.gif", save_all=True, append_images=others, duration=100)
    done = plan(tmp_path, TWO_FILES, model, "--prompt", "<image>a", "--video", tmp_path / "a.gif")
    assert done.returncode == 0, done.stderr
    (item,) = json.loads(done.stdout)["items"]
    assert (item["modality"], item["length"]) == ("video", 3)
    assert item["tensors"] == [{"name": "frames", "dtype": "uint8", "shape": [3, 20, 30, 3]}]


@pytest.mark.skipif(find_spec("soundfile") is not None, reason="the extra is installed")
def test_audio_needs_its_extra(model, tmp_path) -> None:
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(bytes(2000))
    done = plan(tmp_path, TWO_FILES, model, "--prompt", "a", "--audio", tmp_path / "a.wav")
    assert done.returncode == 1
    assert "UNIMPLEMENTED: item 0: audio files need soundfile and soxr" in done.stderr
    assert "pip install 'diptych[audio]'" in done.stderr


def test_a_family_in_one_file_is_refused(model, tmp_path) -> None:
    done = plan(tmp_path, ONE_FILE, model, "--prompt", "a")
    assert done.returncode == 1
    assert "cannot import the plugin 'my_plugin': it needs torch, which is not installed here" in done.stderr
    assert 'executor_model = "package.module:Class"' in done.stderr
