"""The layout's feature tokens are the features that transformers' model produces."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from registry import InputContext, MediaInfo, MediaItem
from registry.families import bind_family
from tests.checkpoints import Checkpoints
from tests.registry.pictures import rgb

TOWERS = [("clip", 56, 14), ("siglip", 56, 14), ("clip", 60, 14), ("siglip", 30, 7)]


@pytest.mark.parametrize("feature_layer", [-2, -1, 1, [-2], [-1, -3], [0, 1, -1]], ids=str)
@pytest.mark.parametrize("select_strategy", ["default", "full"])
@pytest.mark.parametrize(("tower", "image_size", "patch_size"), TOWERS)
def test_num_tokens_is_the_number_of_features(
    checkpoints: Checkpoints, tower: str, image_size: int, patch_size: int, select_strategy: str, feature_layer
) -> None:
    path = checkpoints(
        tower=tower, processor=tower, image_size=image_size, patch_size=patch_size,
        select_strategy=select_strategy, feature_layer=feature_layer,
    )  # fmt: skip
    family = bind_family(InputContext.from_checkpoint(path))
    item = MediaItem(MediaInfo.image(40, 50), rgb(40, 50))
    layout = family.layout(item.info)
    pixels = layout.tensors["pixel_values"].normalization.apply(family.map_item(item)["pixel_values"])
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        (features,) = model.model.get_image_features(pixel_values=torch.from_numpy(pixels[None])).pooler_output
    assert layout.num_tokens == layout.length == len(features) == family.max_tokens("image")
    assert layout.token_ids == [model.config.image_token_id] * len(features)


@pytest.mark.parametrize(
    ("select_strategy", "tower", "expected"),
    [("default", "clip", 576), ("full", "clip", 577), ("default", "siglip", 575), ("full", "siglip", 576)],
)
def test_336_pixels_in_patches_of_14(checkpoints, tower: str, select_strategy: str, expected: int) -> None:
    """LLaVA-1.5's own 576, and its neighbours; the same for pictures of any size."""
    path = checkpoints(tower=tower, processor=tower, image_size=336, select_strategy=select_strategy)
    family = bind_family(InputContext.from_checkpoint(path))
    sizes = [(1, 1), (1, 1000), (336, 336), (480, 640), (8192, 8192)]
    assert {family.layout(MediaInfo.image(*size)).num_tokens for size in sizes} == {expected}
    assert family.max_tokens("image") == expected


def test_layouts_of_one_picture_are_equal(checkpoints: Checkpoints) -> None:
    family = bind_family(InputContext.from_checkpoint(checkpoints()))
    first, second = family.layout(MediaInfo.image(3, 4)), family.layout(MediaInfo.image(500, 2))
    assert first.tensors == second.tensors
    np.testing.assert_array_equal(first.feature_mask, np.ones(16, dtype=bool))
