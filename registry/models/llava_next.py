"""LLaVA-NeXT: one image becomes a base tile and a grid of tiles, as many as its shape is worth (anyres).

The grid is unpadded again after the encoder, so the number of features follows the picture's shape, with
one newline feature behind every row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image
from transformers import LlavaNextConfig

from registry import (
    INPUT_REGISTRY,
    MULTIMODAL_REGISTRY,
    InputContext,
    ItemLayout,
    MediaInfo,
    MediaItem,
    Normalization,
    Run,
    SupportsMultiModal,
    TensorSpec,
)
from registry.errors import CheckpointError
from registry.models.llava import num_features
from registry.models.tiles import TileProcessor

Size = tuple[int, int]
"""(height, width) in pixels or tiles."""


@dataclass(frozen=True)
class AnyRes:
    """A checkpoint's grids: `pinpoints` are the allowed canvas sizes, `tile` the side of a tile in pixels."""

    pinpoints: tuple[Size, ...]
    tile: int
    patches: int
    tiles: TileProcessor
    normalization: Normalization

    @classmethod
    def read(cls, ctx: InputContext) -> AnyRes:
        """CheckpointError where processor and model would cut pictures differently."""
        config = ctx.get_config(LlavaNextConfig)
        tiles = ctx.remember(_read_tiles)
        side, vision = tiles.tile_size[0], config.vision_config
        pinpoints = _as_sizes(ctx.image_processor.image_grid_pinpoints)
        if pinpoints != _as_sizes(config.image_grid_pinpoints):
            raise CheckpointError(
                f"the image processor's image_grid_pinpoints {pinpoints} differ from the model's "
                f"{_as_sizes(config.image_grid_pinpoints)}"
            )
        if uneven := [size for size in pinpoints if size[0] % side or size[1] % side]:
            raise CheckpointError(f"image_grid_pinpoints {uneven} are no multiples of the tile side {side}")
        patches = vision.image_size // vision.patch_size
        if num_features(config, *tiles.tile_size) != patches * patches:
            raise CheckpointError(
                f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} does not leave the "
                f"{patches}x{patches} patches of a {vision.model_type} tower"
            )
        return cls(pinpoints, side, patches, tiles, replace(tiles.normalization, channel_axis=1))

    def canvas(self, size: Size) -> Size:
        """The pinpoint that keeps most of the picture and wastes least.

        The float arithmetic is `transformers.image_processing_utils.select_best_resolution`'s: its rounding
        decides between pinpoints, so it cannot be replaced by exact arithmetic.
        """
        height, width = size
        best = self.pinpoints[0]
        most, least = 0, math.inf
        for pinpoint in self.pinpoints:
            scale = min(pinpoint[1] / width, pinpoint[0] / height)
            effective = min(int(width * scale) * int(height * scale), width * height)
            wasted = pinpoint[0] * pinpoint[1] - effective
            if effective > most or (effective == most and wasted < least):
                best, most, least = pinpoint, effective, wasted
        return best

    def grid(self, size: Size) -> Size:
        """(rows, columns) of tiles."""
        height, width = self.canvas(size)
        return height // self.tile, width // self.tile

    def unpadded(self, size: Size) -> Size:
        """(rows, columns) of features that are left of the grid without its padding.

        Exact floors: `unpad_image` rounds to 7 digits before it cuts, and no quotient of sides up to 65535
        comes that close to the next integer.
        """
        height, width = size
        rows, columns = (count * self.patches for count in self.grid(size))
        if width * rows > columns * height:
            rows -= (rows - height * columns // width) // 2 * 2
        else:
            columns -= (columns - width * rows // height) // 2 * 2
        return rows, columns

    def fit(self, size: Size) -> Size:
        """The picture's size on its canvas; the arithmetic is `get_patch_output_size`'s."""
        (height, width), (canvas_height, canvas_width) = size, self.canvas(size)
        across, down = canvas_width / width, canvas_height / height
        if across < down:
            return min(math.ceil(height * across), canvas_height), canvas_width
        return canvas_height, min(math.ceil(width * down), canvas_width)


def layout(ctx: InputContext, media: MediaInfo) -> ItemLayout:
    """uint8 tiles [1 + rows * columns, 3, H, W]; features of the base tile, then rows with a newline each."""
    anyres = ctx.remember(AnyRes.read)
    rows, columns = anyres.grid(media.size)
    feature_rows, feature_columns = anyres.unpadded(media.size)
    count = anyres.patches**2 + feature_rows * (feature_columns + 1)
    side = anyres.tile
    return ItemLayout(
        replacement=(Run(int(ctx.model_config.image_token_index), count),),
        tensors={"pixel_values": TensorSpec("uint8", (1 + rows * columns, 3, side, side), anyres.normalization)},
        constants={"image_sizes": np.array(media.size, dtype=np.int64)},
    )


def map_image(ctx: InputContext, item: MediaItem) -> dict[str, np.ndarray]:
    """The whole picture squeezed into one tile, then the tiles of its canvas, row by row."""
    anyres = ctx.remember(AnyRes.read)
    picture: Image.Image = anyres.tiles.flatten(item.data)
    size = (picture.height, picture.width)
    side, resample = anyres.tile, anyres.tiles.resample
    base = np.asarray(picture.resize((side, side), resample))
    canvas = _place_on_canvas(picture, anyres.fit(size), anyres.canvas(size), resample)
    rows, columns = anyres.grid(size)
    cut = canvas.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, side, side)
    return {"pixel_values": np.concatenate([base.transpose(2, 0, 1)[None], cut])}


def _place_on_canvas(picture: Image.Image, fitted: Size, canvas: Size, resample: Image.Resampling) -> np.ndarray:
    """The picture in the middle of a black canvas: uint8 [H, W, 3]."""
    pixels = np.zeros((*canvas, 3), dtype=np.uint8)
    top, left = (canvas[0] - fitted[0]) // 2, (canvas[1] - fitted[1]) // 2
    resized = picture.resize((fitted[1], fitted[0]), resample)
    pixels[top : top + fitted[0], left : left + fitted[1]] = np.asarray(resized)
    return pixels


def _read_tiles(ctx: InputContext) -> TileProcessor:
    """The tile part of the processor, whose resize and crop must leave a finished tile as it is."""
    tiles = TileProcessor.read(ctx, ("LlavaNextImageProcessor",))
    height, width = tiles.tile_size
    resized = tiles.resize_to or (tiles.shortest_edge, tiles.shortest_edge)
    if height != width or resized not in ((None, None), (height, width)):
        raise CheckpointError(f"tiles of {height}x{width} pixels resized to {resized} are not supported")
    return tiles


def _as_sizes(pinpoints: Any) -> tuple[Size, ...]:
    return tuple((int(height), int(width)) for height, width in pinpoints)


@MULTIMODAL_REGISTRY.register_image_layout(layout)
@MULTIMODAL_REGISTRY.register_image_input_mapper(map_image)
@MULTIMODAL_REGISTRY.register_max_image_tokens()
@INPUT_REGISTRY.register_dummy_data()
@INPUT_REGISTRY.register_input_processor()
class LlavaNextForConditionalGeneration(SupportsMultiModal):
    """LLaVA-NeXT (LLaVA-1.6) with CLIP or SigLIP towers, on Vicuna-, Llama- or Mistral-shaped language models."""

    executor_model = "executor_service.models.llava_next:LlavaNextModel"
