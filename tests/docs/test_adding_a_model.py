"""The code of docs/adding_a_multimodal_model.md, executed and held against transformers."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from executor_service.engine.request import Request
from registry import InputContext, MediaInfo, MediaLimits
from registry.families import bind_family
from tests.checkpoints import make_llava_checkpoint
from tests.executor_service.conftest import Bench, boot_engine, load_reference, picture
from tests.integration.conftest import picture_bytes, prompt_request
from tests.services import stack

PAGE = Path(__file__).parents[2] / "docs" / "adding_a_multimodal_model.md"
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL))


@pytest.fixture
def plugins(tmp_path, monkeypatch) -> Path:
    """The page's files on the import path."""
    for name, code in FILES.items():
        (tmp_path / name).write_text(code, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in FILES:
        sys.modules.pop(Path(name).stem, None)


def checkpoint_of(path: Path, architecture: str) -> Path:
    """A LLaVA-1.5 checkpoint under another architecture's name."""
    make_llava_checkpoint(path)
    config = json.loads((path / "config.json").read_text())
    config["architectures"] = [architecture]
    (path / "config.json").write_text(json.dumps(config))
    return path


def boot_plugin(path: Path, module: str) -> Bench:
    return Bench(path, boot_engine(path, plugins=(module,)), load_reference(path))


def num_lines(code: str) -> int:
    return sum(bool(line.strip()) for line in code.splitlines())


def test_the_examples_are_as_short_as_promised() -> None:
    assert set(FILES) == {"static_family.py", "dynamic_family.py", "dynamic_executor.py", "by_hand_family.py"}
    assert num_lines(FILES["static_family.py"]) <= 40
    assert num_lines(FILES["dynamic_family.py"]) + num_lines(FILES["dynamic_executor.py"]) <= 90


def test_the_static_family_equals_transformers(plugins, tmp_path) -> None:
    bench = boot_plugin(checkpoint_of(tmp_path / "model", "StaticForConditionalGeneration"), "static_family")
    assert bench.family.max_tokens("image") == 16
    requests = [bench.request(i, "see <image> and <image>", [picture(i), picture(i + 9, 90, 30)]) for i in range(3)]
    outputs = bench.run(requests)
    for request in requests:
        pixels = torch.stack([item.tensors["pixel_values"] for item in request.items]).double()
        assert outputs[request.request_id] == continued(bench, request, {"pixel_values": pixels})


def test_the_dynamic_family_equals_its_tiles_one_by_one(plugins, tmp_path) -> None:
    bench = boot_plugin(checkpoint_of(tmp_path / "model", "DynamicForConditionalGeneration"), "dynamic_family")
    assert bench.family.max_tokens("image") == 9 * 16
    sizes = [(60, 80), (20, 20), (500, 100)]
    assert [bench.family.layout(MediaInfo.image(*size)).length for size in sizes] == [4 * 16 + 2, 17, 6 * 16 + 3]
    requests = [bench.request(i, "so <image>?", [picture(i, *sizes[i])]) for i in range(3)]
    outputs = bench.run(requests)
    for request in requests:
        (item,) = request.items
        spec = item.layout.tensors["pixel_values"]
        tiles = torch.from_numpy(spec.normalization.apply(item.tensors["pixel_values"].numpy())).double()
        assert outputs[request.request_id] == continued(bench, request, {"pixel_values": tiles})


def test_the_family_by_hand_equals_transformers(plugins, tmp_path) -> None:
    """Its own mapper, maximum, dummy data and processor, through both services."""
    path = checkpoint_of(tmp_path / "model", "ByHandForConditionalGeneration")
    settings = {"plugin": "by_hand_family"}
    with stack(path, executor=settings, preprocess=settings) as services:
        data = picture_bytes(3)
        request = prompt_request("see <image> and <image>", [data, data], max_tokens=6)
        tokens = [token for response in services.stub.Generate(request, timeout=60) for token in response.token_ids]
        services.check_idle()
    reference = load_reference(path)
    pixels = np.asarray(Image.open(io.BytesIO(data)).resize((56, 56)), dtype=np.float32) / 127.5 - 1
    tokenizer = InputContext.from_checkpoint(path).tokenizer
    ids = tokenizer("see " + "<image>" * 16 + " and " + "<image>" * 16, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        out = reference.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False,
            eos_token_id=None, pad_token_id=0,
            pixel_values=torch.from_numpy(pixels.transpose(2, 0, 1).copy()).double().expand(2, 3, 56, 56),
        )  # fmt: skip
    assert tokens == out[0, ids.shape[1] :].tolist()


def continued(bench: Bench, request: Request, media: dict[str, torch.Tensor]) -> list[int]:
    """transformers' greedy answer to the expanded prompt; each tile is a picture to it."""
    ids = torch.from_numpy(np.array(request.token_ids[: request.num_prompt_tokens]))[None]
    count = request.max_tokens - request.num_prompt_tokens
    with torch.inference_mode():
        out = bench.reference.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
            do_sample=False, eos_token_id=None, pad_token_id=0, **media,
        )  # fmt: skip
    return out[0, ids.shape[1] :].tolist()


def test_the_registrations_need_no_executor(plugins, tmp_path) -> None:
    """Planning with either family imports no executor model."""
    for module, name in (("static_family", "Static"), ("dynamic_family", "Dynamic")):
        path = checkpoint_of(tmp_path / name, f"{name}ForConditionalGeneration")
        family = bind_family(InputContext.from_checkpoint(path, MediaLimits({"image": 2})), [module])
        inputs, items = family.dummy_data(100, {"image": 2})
        assert len(items) == 2
        assert len(inputs.prompt_token_ids) >= 100
    assert "dynamic_executor" not in sys.modules
