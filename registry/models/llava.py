"""LLaVA-1.5: one image becomes one square tile and a fixed number of features."""

from __future__ import annotations

from typing import Final

import numpy as np
from transformers import LlavaConfig

from registry import (
    INPUT_REGISTRY,
    MULTIMODAL_REGISTRY,
    InputContext,
    ItemLayout,
    MediaInfo,
    MediaItem,
    Run,
    SupportsMultiModal,
    TensorSpec,
)
from registry.errors import CheckpointError
from registry.models.tiles import TileProcessor

CLASS_TOKENS: Final = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""Tokens a vision tower puts before its patches, by its model type."""


def layout(ctx: InputContext, media: MediaInfo) -> ItemLayout:
    """The same for every size: a uint8 tile [3, H, W] and its patches as features."""
    config = ctx.get_config(LlavaConfig)
    tiles = TileProcessor.of(ctx)
    height, width = tiles.tile_size
    count = num_features(config, height, width)
    return ItemLayout(
        replacement=(Run(int(config.image_token_index), count),),
        tensors={"pixel_values": TensorSpec("uint8", (3, height, width), tiles.normalization)},
    )


def num_features(config: LlavaConfig, height: int, width: int) -> int:
    """Features of one tile of `height` x `width` pixels, as `LlavaModel.get_image_features` returns them."""
    vision = config.vision_config
    if vision.model_type not in CLASS_TOKENS:
        raise CheckpointError(
            f"LLaVA with a {vision.model_type!r} tower is not supported; supported: {', '.join(CLASS_TOKENS)}"
        )
    if (height, width) != (vision.image_size, vision.image_size):
        raise CheckpointError(
            f"the image processor makes tiles of {height}x{width} pixels, the vision tower takes "
            f"{vision.image_size}x{vision.image_size}"
        )
    tokens = (height // vision.patch_size) * (width // vision.patch_size) + CLASS_TOKENS[vision.model_type]
    return tokens - 1 if config.vision_feature_select_strategy == "default" else tokens


def map_image(ctx: InputContext, item: MediaItem) -> dict[str, np.ndarray]:
    """The tile as the vision tower sees it, before rescaling and normalising."""
    return {"pixel_values": TileProcessor.of(ctx).make_tile(item.data)}


@MULTIMODAL_REGISTRY.register_image_layout(layout)
@MULTIMODAL_REGISTRY.register_image_input_mapper(map_image)
@MULTIMODAL_REGISTRY.register_max_image_tokens()
@INPUT_REGISTRY.register_dummy_data()
@INPUT_REGISTRY.register_input_processor()
class LlavaForConditionalGeneration(SupportsMultiModal):
    """LLaVA-1.5 and its relatives with CLIP or SigLIP towers, on Llama- or Mistral-shaped language models."""

    executor_model = "executor_service.models.llava:LlavaModel"
