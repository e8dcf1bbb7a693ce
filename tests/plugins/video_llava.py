"""Video-LLaVA: pictures, and videos whose frames go through the image mapper; this file needs no torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from transformers import VideoLlavaConfig

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


def num_patches(ctx: InputContext) -> int:
    vision = ctx.get_config(VideoLlavaConfig).vision_config
    return (vision.image_size // vision.patch_size) ** 2


def image_layout(ctx: InputContext, media: MediaInfo) -> ItemLayout:
    tiles = TileProcessor.of(ctx)
    return ItemLayout(
        replacement=(Run(ctx.model_config.image_token_index, num_patches(ctx)),),
        tensors={"pixel_values": TensorSpec("uint8", (3, *tiles.tile_size), tiles.normalization)},
    )


def video_layout(ctx: InputContext, media: MediaInfo) -> ItemLayout:
    """Every frame keeps its class token."""
    tiles = TileProcessor.of(ctx)
    spec = TensorSpec("uint8", (media.num_frames, 3, *tiles.tile_size), replace(tiles.normalization, channel_axis=1))
    return ItemLayout(
        replacement=(Run(ctx.model_config.video_token_index, media.num_frames * (num_patches(ctx) + 1)),),
        tensors={"pixel_values_videos": spec},
    )


def map_image(ctx: InputContext, item: MediaItem) -> dict[str, np.ndarray]:
    return {"pixel_values": TileProcessor.of(ctx).make_tile(item.data)}


@MULTIMODAL_REGISTRY.register_image_layout(image_layout)
@MULTIMODAL_REGISTRY.register_image_input_mapper(map_image)
@MULTIMODAL_REGISTRY.register_item_layout("video", video_layout)
@MULTIMODAL_REGISTRY.register_input_mapper("video")
class VideoLlavaForConditionalGeneration(SupportsMultiModal):
    executor_model = "tests.plugins.video_llava_model:VideoLlavaModel"
