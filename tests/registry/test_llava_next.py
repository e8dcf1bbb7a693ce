"""LLaVA-NeXT: counts, tiles and grids are transformers' own, over sizes that matter."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, LlavaNextForConditionalGeneration
from transformers.image_utils import load_image
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from registry import InputContext, MediaInfo, MediaItem
from registry.errors import CheckpointError
from registry.families import bind_family
from registry.family import ModelFamily
from tests.checkpoints import make_llava_checkpoint, processor_config, write_json

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
TABLE = {
    (448, 448): 2928, (672, 672): 2928, (336, 336): 1176, (480, 640): 2340, (640, 480): 2352, (1080, 1920): 1948,
    (1000, 300): 2232, (300, 1000): 2182, (184, 161): 1128, (1, 1000): 576, (352, 748): 1848,
}  # fmt: skip
SMALL_PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> ModelFamily:
    """The original's geometry: tiles of 336 pixels, patches of 14."""
    path = make_llava_checkpoint(tmp_path_factory.mktemp("next"), image_size=336, pinpoints=PINPOINTS)
    return bind_family(InputContext.from_checkpoint(path))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> ModelFamily:
    path = make_llava_checkpoint(tmp_path_factory.mktemp("small"), pinpoints=SMALL_PINPOINTS)
    return bind_family(InputContext.from_checkpoint(path))


def sizes(count: int, largest: int, seed: int) -> list[tuple[int, int]]:
    """Random sizes, and the edges of the pinpoints, primes and extremes."""
    rng = np.random.default_rng(seed)
    edges = [side + delta for side in (336, 672, 1008) for delta in (-1, 0, 1)]
    special = [(h, w) for h in (*edges, 1, 2, 97) for w in (*edges, 1, 3, 101)]
    drawn = [(int(h), int(w)) for h, w in rng.integers(1, largest, (count, 2))]
    return [*TABLE, *special, *drawn]


def reference_count(processor: Callable, height: int, width: int) -> int:
    """`LlavaNextProcessor`'s own arithmetic for one picture, base tile and class token as in the default strategy."""
    self = type("P", (), {"image_processor": processor, "patch_size": 14, "num_additional_image_tokens": 1})()
    self._get_unpadded_features = LlavaNextProcessor._get_unpadded_features.__get__(self)
    return LlavaNextProcessor._get_number_of_features(self, height, width, 336, 336) - 1


def test_counts_of_the_table(family: ModelFamily) -> None:
    assert {size: family.layout(MediaInfo.image(*size)).num_tokens for size in TABLE} == TABLE


def test_counts_equal_the_processors(family: ModelFamily) -> None:
    processor = family.ctx.image_processor
    for height, width in sizes(3000, 4000, 1):
        got = family.layout(MediaInfo.image(height, width)).num_tokens
        assert got == reference_count(processor, height, width), (height, width)


def test_maximum_is_attained_and_never_exceeded(family: ModelFamily) -> None:
    assert family.max_tokens("image") == 2928
    assert all(family.layout(MediaInfo.image(*size)).num_tokens <= 2928 for size in sizes(3000, 8192, 2))


def test_features_of_the_model_equal_the_counts(small: ModelFamily) -> None:
    model = LlavaNextForConditionalGeneration.from_pretrained(small.ctx.model_dir).eval()
    for height, width in [(60, 80), (200, 31), (1, 300), (112, 112), (57, 55), (500, 499), (300, 100)]:
        layout = small.layout(MediaInfo.image(height, width))
        tiles = torch.zeros(layout.tensors["pixel_values"].shape)
        with torch.inference_mode():
            (features,) = model.model.get_image_features(tiles, torch.tensor([[height, width]])).pooler_output
        assert len(features) == layout.num_tokens, (height, width)


@pytest.mark.parametrize("which", ["family", "small"])
def test_tiles_equal_the_processors(which: str, request: pytest.FixtureRequest) -> None:
    """Bit for bit after normalisation, over 400 sizes in all, the whole table among them."""
    family = request.getfixturevalue(which)
    processor = AutoImageProcessor.from_pretrained(family.ctx.model_dir, backend="pil")
    rng = np.random.default_rng(5)
    if which == "family":
        chosen = [*TABLE, *sizes(30, 900, 3)[len(TABLE) :: 2]]
    else:
        chosen = [(int(height), int(width)) for height, width in rng.integers(1, 300, (310, 2))]
    assert len(set(chosen)) > {"family": 90, "small": 305}[which]
    for height, width in chosen:
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        info = MediaInfo.image(height, width)
        tensor = family.map_item(MediaItem(info, picture))["pixel_values"]
        got = family.layout(info).tensors["pixel_values"].normalization.apply(tensor)
        expected = processor(images=[picture], return_tensors="np")
        np.testing.assert_array_equal(got, expected["pixel_values"][0], err_msg=f"{height}x{width}")
        assert expected["image_sizes"][0].tolist() == family.layout(info).constants["image_sizes"].tolist()


def test_a_transparent_colour_is_flattened_as_by_the_processor(small: ModelFamily) -> None:
    """An RGB file may name one of its colours transparent; the processor then sees what lies behind it."""
    pixels = np.random.default_rng(0).integers(0, 4, (60, 80, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", transparency=tuple(pixels[0, 0].tolist()))
    picture = load_image(Image.open(file))
    info = MediaInfo.image(60, 80)
    tensor = small.map_item(MediaItem(info, picture))["pixel_values"]
    got = small.layout(info).tensors["pixel_values"].normalization.apply(tensor)
    processor = AutoImageProcessor.from_pretrained(small.ctx.model_dir, backend="pil")
    np.testing.assert_array_equal(got, processor(images=[picture], return_tensors="np")["pixel_values"][0])


def test_dummy_data_holds_the_maximum(family: ModelFamily) -> None:
    inputs, items = family.dummy_data(4000, {"image": 2})
    assert len(inputs.prompt_token_ids) >= 2 * 2928
    assert [family.layout(item.info).num_tokens for item in items] == [2928, 2928]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"image_grid_pinpoints": [[56, 56]]}, "differ from the model's"),
        ({"size": {"shortest_edge": 40}}, "tiles of 56x56 pixels resized to"),
        ({"image_processor_type": "CLIPImageProcessor"}, "supported: LlavaNextImageProcessor"),
    ],
)
def test_checkpoints_that_contradict_themselves(tmp_path: Path, changes: dict, text: str) -> None:
    path = make_llava_checkpoint(tmp_path / "model", pinpoints=SMALL_PINPOINTS)
    values = {"image_grid_pinpoints": SMALL_PINPOINTS, **changes}
    write_json(path / "preprocessor_config.json", processor_config("llava-next", 56, **values))
    family = bind_family(InputContext.from_checkpoint(path))
    with pytest.raises(CheckpointError, match=text):
        family.layout(MediaInfo.image(50, 50))


def test_pinpoints_that_no_tiles_fill(tmp_path: Path) -> None:
    family = bind_family(InputContext.from_checkpoint(make_llava_checkpoint(tmp_path / "model", pinpoints=[[56, 100]])))
    with pytest.raises(CheckpointError, match=r"\[\(56, 100\)\] are no multiples of the tile side 56"):
        family.layout(MediaInfo.image(50, 50))


def test_a_strategy_that_does_not_leave_a_grid(tmp_path: Path) -> None:
    path = make_llava_checkpoint(tmp_path / "model", pinpoints=SMALL_PINPOINTS, select_strategy="full")
    family = bind_family(InputContext.from_checkpoint(path))
    with pytest.raises(CheckpointError, match="does not leave the 4x4 patches"):
        family.layout(MediaInfo.image(50, 50))
