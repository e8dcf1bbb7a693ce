"""A window of a resized picture, without the rest of it.

A 1x8192 picture scaled to a shortest edge of 336 has 925 million pixels, of which a centre crop keeps
336x336. This computes just those, with Pillow's fixed-point arithmetic (src/libImaging/Resample.c:
22-bit weights, rounded to 8 bits after the horizontal and after the vertical pass), so the pixels are
Pillow's bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
from PIL import Image

PRECISION_BITS: Final = 32 - 8 - 2
Box = tuple[int, int, int, int]


def _bicubic(x: np.ndarray) -> np.ndarray:
    a, x = -0.5, np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _bilinear(x: np.ndarray) -> np.ndarray:
    return np.maximum(1.0 - np.abs(x), 0.0)


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where((x >= -3.0) & (x < 3.0), np.sinc(x) * np.sinc(x / 3), 0.0)


_FILTERS: Final[Mapping[Image.Resampling, tuple[Callable[[np.ndarray], np.ndarray], float]]] = {
    Image.Resampling.BILINEAR: (_bilinear, 1.0),
    Image.Resampling.BICUBIC: (_bicubic, 2.0),
    Image.Resampling.LANCZOS: (_lanczos, 3.0),
}


def resize_window(pixels: np.ndarray, size: tuple[int, int], window: Box, resample: Image.Resampling) -> np.ndarray:
    """uint8 [H, W, C] resized to `size` (height, width), of which `window` (left, top, right, bottom).

    Returns uint8 [bottom - top, right - left, C]. ValueError for a filter it does not know.
    """
    if resample not in _FILTERS:
        raise ValueError(f"{resample.name} cannot be computed in a window")
    left, top, right, bottom = window
    rows, row_weights = _weights(pixels.shape[0], size[0], top, bottom, resample)
    columns, column_weights = _weights(pixels.shape[1], size[1], left, right, resample)
    band = pixels[rows.min() : rows.max() + 1]
    across = _weigh(band.transpose(1, 0, 2), columns, column_weights).transpose(1, 0, 2)
    return _weigh(across, rows - rows.min(), row_weights)


def _weights(
    in_size: int, out_size: int, start: int, stop: int, resample: Image.Resampling
) -> tuple[np.ndarray, np.ndarray]:
    """Source indices and integer weights of outputs `start` to `stop`, each [stop - start, taps]."""
    kernel, reach = _FILTERS[resample]
    scale = in_size / out_size
    stretch = max(scale, 1.0)
    support = reach * stretch
    centers = (np.arange(start, stop) + 0.5) * scale
    first = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centers + support + 0.5).astype(np.int64), in_size)
    taps = np.arange(int((last - first).max()))
    indices = first[:, None] + taps
    inside = indices < last[:, None]
    weights = np.where(inside, kernel((indices - centers[:, None] + 0.5) / stretch), 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    fixed = np.trunc(weights * (1 << PRECISION_BITS) + np.where(weights < 0, -0.5, 0.5)).astype(np.int64)
    return np.minimum(indices, in_size - 1), np.where(inside, fixed, 0)


def _weigh(lines: np.ndarray, indices: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted sums of lines [n, ...] -> uint8 [outputs, ...]."""
    total = np.full((indices.shape[0], *lines.shape[1:]), 1 << (PRECISION_BITS - 1), dtype=np.int64)
    for tap in range(indices.shape[1]):
        total += lines[indices[:, tap]].astype(np.int64) * weights[:, tap, None, None]
    return np.clip(total >> PRECISION_BITS, 0, 255).astype(np.uint8)
