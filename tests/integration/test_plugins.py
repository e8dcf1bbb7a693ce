"""Families from outside: one file with its own model, and a real package found by its entry point."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from executor_service.layers import Attention
from registry import InputContext, MediaInfo, MediaItem, ProcessorInputs
from registry.errors import RegistryError
from registry.families import known_families, open_family
from tests.integration.conftest import picture_bytes, prompt_request
from tests.integration.test_audio import Reference as AudioReference
from tests.integration.test_audio import sound
from tests.plugins.checkpoints import make_patchwork, make_qwen2_audio
from tests.services import Stack, stack

ROOT = Path(__file__).parents[2]
PLUGIN = "tests.plugins.patchwork"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_patchwork(tmp_path_factory.mktemp("patchwork"))


@pytest.fixture(scope="module")
def sewn(checkpoint) -> Iterator[Stack]:
    with stack(
        checkpoint, executor={"plugin": PLUGIN, "max_num_batched_tokens": 24}, preprocess={"plugin": PLUGIN}
    ) as services:
        yield services
        services.check_idle()


def dense_attention(self: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What the paged one must equal: the whole sequence at once, causal."""
    heads = [part.transpose(0, 1)[None] for part in (query, key, value)]
    out = nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1)


def reference_tokens(checkpoint: Path, text: str, pictures: list[bytes], count: int) -> list[int]:
    family = open_family(checkpoint, plugins=[PLUGIN])
    model = family.cls(family.ctx)
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    model.double()
    opened = [Image.open(io.BytesIO(data)) for data in pictures]
    items = [MediaItem(MediaInfo.image(picture.height, picture.width), picture) for picture in opened]
    inputs = family.process(ProcessorInputs(family.ctx.tokenizer(text)["input_ids"], [item.info for item in items]))
    ids = torch.tensor(inputs.prompt_token_ids)
    embedded = model.embeddings(ids)
    cells = [torch.from_numpy(family.map_item(item)["cells"]).double() for item in items]
    if items:
        features = torch.cat(model.embed_multimodal(cells))
        mask = np.zeros(len(ids), dtype=bool)
        for place, layout in zip(inputs.placeholders, inputs.layouts, strict=True):
            mask[place.offset : place.end] = layout.feature_mask
        embedded[torch.from_numpy(mask)] = features
    found: list[int] = []
    for _ in range(count):
        hidden = model(None, torch.arange(len(embedded)), embedded)
        found.append(int(model.compute_logits(hidden[-1]).argmax()))
        embedded = torch.cat([embedded, model.embeddings(torch.tensor(found[-1:]))])
    return found


CASES = [
    ("hello", []),
    ("<image> what", [picture_bytes(1, 45, 90)]),
    ("a <image><image> b", [picture_bytes(2, 130, 10), picture_bytes(3, 300, 300)]),
]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_model_of_its_own_in_one_file(sewn, checkpoint, monkeypatch, number: int) -> None:
    text, pictures = CASES[number]
    responses = list(sewn.stub.Generate(prompt_request(text, pictures, max_tokens=12), timeout=60))
    tokens = [token for response in responses for token in response.token_ids]
    monkeypatch.setattr(Attention, "forward", dense_attention)
    with torch.inference_mode():
        assert tokens == reference_tokens(checkpoint, text, pictures, 12)
    assert len(set(tokens)) > 2


def test_one_file_needs_torch(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, PLUGIN)
    message = r'needs torch, which is not installed here.*use two files.*executor_model = "package\.module:Class"'
    with pytest.raises(RegistryError, match=message):
        known_families([PLUGIN])


def test_a_configuration_that_only_the_family_can_read(checkpoint) -> None:
    family = open_family(checkpoint, plugins=[PLUGIN])
    assert type(family.ctx.model_config).__name__ == "PatchworkConfig"
    with pytest.raises(RegistryError, match=r"cannot read .*config\.json: .*patchwork"):
        InputContext.from_checkpoint(checkpoint)


# --- a real package ---------------------------------------------------------------------------------

PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "diptych-hears"
version = "1.0"

[project.entry-points."diptych.models"]
Qwen2AudioForConditionalGeneration = "diptych_hears.family:Qwen2AudioForConditionalGeneration"

[tool.setuptools]
packages = ["diptych_hears"]
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The two files of the audio family as a package, built and installed into a folder of its own."""
    source, target = tmp_path_factory.mktemp("package"), tmp_path_factory.mktemp("installed")
    package = source / "diptych_hears"
    package.mkdir()
    (source / "pyproject.toml").write_text(PROJECT, "utf-8")
    (package / "__init__.py").touch()
    for name, module in (("qwen2_audio", "family"), ("qwen2_audio_model", "model")):
        text = (ROOT / "tests" / "plugins" / f"{name}.py").read_text("utf-8")
        text = text.replace("tests.plugins.qwen2_audio_model", "diptych_hears.model")
        (package / f"{module}.py").write_text(text, "utf-8")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", target]
    subprocess.run([*command, source], check=True, capture_output=True)
    return target


def test_an_installed_package_is_found_by_its_entry_point(installed, tmp_path) -> None:
    """The commands, as a user runs them: both services, one audio file."""
    model, file = make_qwen2_audio(tmp_path / "model"), tmp_path / "sound.wav"
    file.write_bytes(sound(1))
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "diptych.cli.main", "generate", "--model", model, "--dtype", "float64"]
    asked = ["--prompt", "What is <|AUDIO|> this?", "--audio", file, "--max-tokens", "6", "--ignore-eos", "--json"]
    done = subprocess.run(
        [*command, *asked], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    expected = AudioReference(model).generate("What is <|AUDIO|> this?", [file.read_bytes()], 6)
    assert json.loads(done.stdout)["token_ids"] == expected


def test_without_the_package_nobody_serves_it(tmp_path) -> None:
    model = make_qwen2_audio(tmp_path / "model")
    with pytest.raises(RegistryError, match="no family is registered for architecture 'Qwen2AudioForCondit"):
        open_family(model)
