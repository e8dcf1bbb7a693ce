"""Gemma 3 without pan and scan: a picture is a fixed number of tokens that see each other; this file needs no torch."""

from __future__ import annotations

import numpy as np
from transformers import Gemma3Config

from registry import (
    MULTIMODAL_REGISTRY,
    InputContext,
    ItemLayout,
    MediaInfo,
    MediaItem,
    Run,
    SupportsMultiModal,
    TensorSpec,
)
from registry.models.tiles import TileProcessor


def layout(ctx: InputContext, media: MediaInfo) -> ItemLayout:
    config, tiles = ctx.get_config(Gemma3Config), TileProcessor.of(ctx)
    return ItemLayout(
        replacement=(
            Run(config.boi_token_index, 1, False),
            Run(config.image_token_index, config.mm_tokens_per_image),
            Run(config.eoi_token_index, 1, False),
        ),
        tensors={"pixel_values": TensorSpec("uint8", (3, *tiles.tile_size), tiles.normalization)},
    )


def map_image(ctx: InputContext, item: MediaItem) -> dict[str, np.ndarray]:
    return {"pixel_values": TileProcessor.of(ctx).make_tile(item.data)}


@MULTIMODAL_REGISTRY.register_image_layout(layout)
@MULTIMODAL_REGISTRY.register_image_input_mapper(map_image)
class Gemma3ForConditionalGeneration(SupportsMultiModal):
    executor_model = "tests.plugins.gemma3_model:Gemma3Model"
