"""A picture as LLaVA-NeXT sees it: uint8 tiles, and for every image token the patch that it stands for.

Pixels and counts are those of transformers' `LlavaNextImageProcessor` (PIL backend) and `LlavaNextModel`; the
arithmetic is repeated here so that worker processes draw thousands of pictures a second, and say what each token sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from transformers.image_processing_utils import select_best_resolution

TILE_SIDE, PATCH_SIDE = 96, 8
GRID = TILE_SIDE // PATCH_SIDE
PATCHES = GRID * GRID
# (height, width), as the checkpoint's configuration lists them.
PINPOINTS = [[96, 192], [192, 96], [192, 192], [288, 96], [96, 288]]
NEWLINE = -2
"""Stands in `sources` for the learned newline feature at the end of a row."""


@dataclass(frozen=True)
class View:
    """A tile's place in the picture: tile pixel = picture pixel * scale + offset, (x, y) order."""

    scale: tuple[float, float]
    offset: tuple[float, float]


@dataclass(frozen=True)
class Tiles:
    """Tiles [number, side, side, RGB], the base view first, and what each image token stands for.

    A source is tile * PATCHES + patch, or NEWLINE.
    """

    pixels: NDArray[np.uint8]
    views: list[View]
    sources: NDArray[np.int64]


def cut(picture: Image.Image) -> Tiles:
    """Resize, pad and cut an RGB picture."""
    height, width = select_best_resolution((picture.height, picture.width), PINPOINTS)
    new_height, new_width = resized(picture.height, picture.width, height, width)
    left, top = (width - new_width) // 2, (height - new_height) // 2
    canvas = np.zeros((height, width, 3), np.uint8)
    canvas[top : top + new_height, left : left + new_width] = _resize(picture, new_width, new_height)
    scale = (new_width / picture.width, new_height / picture.height)
    corners = [(x, y) for y in range(0, height, TILE_SIDE) for x in range(0, width, TILE_SIDE)]
    tiles = [canvas[y : y + TILE_SIDE, x : x + TILE_SIDE] for x, y in corners]
    base = View((TILE_SIDE / picture.width, TILE_SIDE / picture.height), (0.0, 0.0))
    return Tiles(
        np.stack([_resize(picture, TILE_SIDE, TILE_SIDE), *tiles]),
        [base, *(View(scale, (left - x, top - y)) for x, y in corners)],
        _sources(picture.height, picture.width, height, width),
    )


def resized(old_height: int, old_width: int, height: int, width: int) -> tuple[int, int]:
    """Return the (height, width) that a picture has inside a pinpoint."""
    scale_w, scale_h = width / old_width, height / old_height
    if scale_w < scale_h:
        return min(math.ceil(old_height * scale_w), height), width
    return height, min(math.ceil(old_width * scale_h), width)


def _resize(picture: Image.Image, width: int, height: int) -> NDArray[np.uint8]:
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))


def _sources(old_height: int, old_width: int, height: int, width: int) -> NDArray[np.int64]:
    """Base patches, then the unpadded rows of the tiled view, each ended by a newline."""
    rows, columns = np.mgrid[0 : height // PATCH_SIDE, 0 : width // PATCH_SIDE]
    tile = 1 + rows // GRID * (width // TILE_SIDE) + columns // GRID
    source = unpad(tile * PATCHES + rows % GRID * GRID + columns % GRID, old_height, old_width)
    ended = np.concatenate([source, np.full((len(source), 1), NEWLINE)], axis=1)
    return np.concatenate([np.arange(PATCHES), ended.ravel()])


def unpad(grid: NDArray[np.int64], old_height: int, old_width: int) -> NDArray[np.int64]:
    """Drop the rows or columns of a patch grid that hold nothing but padding."""
    height, width = grid.shape
    if old_width / old_height > width / height:
        padding = (height - int(round(old_height * (width / old_width), 7))) // 2
        return grid[padding : height - padding]
    padding = (width - int(round(old_width * (height / old_height), 7))) // 2
    return grid[:, padding : width - padding]
