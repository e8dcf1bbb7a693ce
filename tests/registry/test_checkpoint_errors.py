"""Checkpoints that cannot be served say why, before anything runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlavaConfig

from registry import InputContext
from registry.errors import CheckpointError, UnknownArchitectureError
from registry.families import bind_family
from registry.fingerprint import fingerprint
from tests.checkpoints import make_llava_checkpoint, write_json

Change = Callable[[Path], Any]
CROP = {"height": 84, "width": 84}
SUPPORTED_SIZES = "is not supported; supported: shortest_edge, or height and width"


def remove(*names: str) -> Change:
    return lambda path: [(path / name).unlink() for name in names]


def write(name: str, text: str) -> Change:
    return lambda path: (path / name).write_text(text, "utf-8")


def edit(name: str, **changes: Any) -> Change:
    """Set entries of a JSON file; None removes them."""

    def change(path: Path) -> None:
        merged = {**json.loads((path / name).read_text("utf-8")), **changes}
        write_json(path / name, {key: value for key, value in merged.items() if value is not None})

    return change


def config(**changes: Any) -> Change:
    return edit("config.json", **changes)


def processor(**changes: Any) -> Change:
    return edit("preprocessor_config.json", **changes)


CASES: dict[str, tuple[Change, str]] = {
    "no directory": (shutil.rmtree, "PATH is not a checkpoint directory: it has no config.json"),
    "no config": (remove("config.json"), "PATH is not a checkpoint directory: it has no config.json"),
    "broken config": (write("config.json", "{"), "cannot read PATH/config.json: "),
    "unknown model type": (config(model_type="foo"), "cannot read PATH/config.json: .*`foo`"),
    "wrong type": (config(image_token_index="x"), "cannot read PATH/config.json: .*'image_token_index'"),
    "unknown strategy": (
        config(vision_feature_select_strategy="cls"),
        "cannot read PATH/config.json: .*'vision_feature_select_strategy'.*got cls",
    ),
    "no tokenizer": (
        remove("tokenizer.json", "tokenizer_config.json"),
        "cannot read the tokenizer of PATH, which has no tokenizer.json: ",
    ),
    "broken tokenizer": (write("tokenizer.json", "{"), "cannot read the tokenizer of PATH: "),
    "no architecture": (config(architectures=None), "PATH/config.json names no architecture"),
    "placeholder out of range": (
        config(image_token_index=5000),
        "LlavaForConditionalGeneration: the image placeholder is token 5000, which the tokenizer of PATH does not have",
    ),
    "other tower": (
        config(vision_config={"model_type": "dinov2"}),
        "LLaVA with a 'dinov2' tower is not supported; supported: clip_vision_model, siglip_vision_model",
    ),
    "other tile size": (
        processor(size={"shortest_edge": 84}, crop_size=CROP),
        "the image processor makes tiles of 84x84 pixels, the vision tower takes 56x56",
    ),
    "tile that is not square": (
        processor(crop_size={"height": 56, "width": 42}),
        "the image processor makes tiles of 56x42 pixels, the vision tower takes 56x56",
    ),
    "no processor": (remove("preprocessor_config.json"), "cannot make the image processor of PATH: "),
    "broken processor": (write("preprocessor_config.json", "{"), "PATH/preprocessor_config.json is not valid JSON: "),
    "unsupported processor": (
        processor(image_processor_type="ViTImageProcessor"),
        "ViTImageProcessor is not supported here; supported: "
        "CLIPImageProcessor, SiglipImageProcessor, LlavaImageProcessor",
    ),
    "unknown processor": (processor(image_processor_type="Foo"), "cannot make the image processor of PATH: "),
    "size of no kind": (processor(size="big"), "cannot make the image processor of PATH: .*big"),
    "tiles of varying size": (
        processor(do_center_crop=False),
        "the image processor gives tiles of varying size; a fixed crop or size is needed",
    ),
    "longest edge": (
        processor(size={"longest_edge": 60}),
        f"an image processor that resizes to {{'longest_edge': 60}} {SUPPORTED_SIZES}",
    ),
    "two edges": (
        processor(size={"shortest_edge": 56, "longest_edge": 60}),
        f"an image processor that resizes to {{'shortest_edge': 56, 'longest_edge': 60}} {SUPPORTED_SIZES}",
    ),
    "largest size": (
        processor(size={"max_height": 60, "max_width": 70}),
        f"an image processor that resizes to {{'max_height': 60, 'max_width': 70}} {SUPPORTED_SIZES}",
    ),
    "padding": (
        processor(do_pad=True, pad_size={"height": 70, "width": 70}),
        "CLIPImageProcessor with a pad_size is not supported",
    ),
    "filter by name": (
        processor(resample="bicubic"),
        "an image processor with resample 'bicubic' is not supported; supported: 0 (NEAREST), 4 (BOX), ",
    ),
    "filter by another number": (
        processor(resample=7),
        "an image processor with resample 7 is not supported; supported: 0 (NEAREST), 4 (BOX), ",
    ),
    "too few means": (
        processor(image_mean=[0.5]),
        "the image processor's image_mean is (0.5,); it must be a number or one for each of RGB",
    ),
    "deviations of words": (
        processor(image_std=["a", "b", "c"]),
        "the image processor's image_std is ('a', 'b', 'c'); it must be a number or one for each of RGB",
    ),
}


def boot(path: Path) -> None:
    """What both services do first."""
    family = bind_family(InputContext.from_checkpoint(path))
    assert family.placeholder_texts
    fingerprint(family)


def test_an_unchanged_checkpoint_boots(tmp_path: Path) -> None:
    boot(make_llava_checkpoint(tmp_path / "model"))


@pytest.mark.parametrize("case", CASES)
def test_message(tmp_path: Path, case: str) -> None:
    change, message = CASES[case]
    path = make_llava_checkpoint(tmp_path / "model")
    change(path)
    with pytest.raises(CheckpointError) as caught:
        boot(path)
    text = " ".join(str(caught.value).replace(str(path), "PATH").split())
    start, _, inside = message.partition(".*")
    assert text.startswith(start.strip()), text
    assert all(part in text for part in inside.split(".*")), text
    assert text != start.strip() or not message.endswith(": "), "no reason given"


def test_unknown_architecture(tmp_path: Path) -> None:
    path = make_llava_checkpoint(tmp_path / "model")
    config(architectures=["FooForBar"])(path)
    with pytest.raises(UnknownArchitectureError, match=r"architecture 'FooForBar' of .*; registered: .*LlavaFor"):
        boot(path)


def test_a_configuration_of_another_class(tmp_path: Path) -> None:
    path = make_llava_checkpoint(tmp_path / "model")
    write_json(path / "config.json", {"model_type": "llama", "architectures": ["LlavaForConditionalGeneration"]})
    with pytest.raises(TypeError, match=r"^LlavaFor.* needs a LlavaConfig, the checkpoint has a LlamaConfig$"):
        InputContext.from_checkpoint(path).get_config(LlavaConfig)


def test_a_tokenizer_without_a_fast_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_llava_checkpoint(tmp_path / "model")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: SimpleNamespace(is_fast=False))
    with pytest.raises(CheckpointError, match=r"has no fast form \(tokenizer\.json\); convert it first$"):
        boot(path)
