"""A window of a resized picture, without the rest of it.

A 1x8192 picture scaled to a shortest edge of 336 has 925 million pixels, of which a centre crop keeps
336x336. This computes just those, with Pillow's fixed-point arithmetic (src/libImaging/Resample.c:
22-bit weights, rounded to 8 bits after each pass), so the pixels are Pillow's bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
from PIL import Image

PRECISION_BITS: Final = 32 - 8 - 2
Box = tuple[int, int, int, int]
Taps = tuple[np.ndarray, np.ndarray]
"""Source indices and integer weights of each output, both [outputs, taps]."""


def _box(x: np.ndarray) -> np.ndarray:
    return np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)


def _bicubic(x: np.ndarray) -> np.ndarray:
    a, x = -0.5, np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _bilinear(x: np.ndarray) -> np.ndarray:
    return np.maximum(1.0 - np.abs(x), 0.0)


def _hamming(x: np.ndarray) -> np.ndarray:
    window = np.float64(np.float32(0.54)) + np.float64(np.float32(0.46)) * np.cos(np.pi * x)
    return np.where(np.abs(x) < 1.0, np.sinc(x) * window, 0.0)


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where((x >= -3.0) & (x < 3.0), np.sinc(x) * np.sinc(x / 3), 0.0)


_FILTERS: Final[Mapping[Image.Resampling, tuple[Callable[[np.ndarray], np.ndarray], float]]] = {
    Image.Resampling.BOX: (_box, 0.5),
    Image.Resampling.BILINEAR: (_bilinear, 1.0),
    Image.Resampling.HAMMING: (_hamming, 1.0),
    Image.Resampling.BICUBIC: (_bicubic, 2.0),
    Image.Resampling.LANCZOS: (_lanczos, 3.0),
}
RESAMPLING: Final = (Image.Resampling.NEAREST, *_FILTERS)
"""The filters that `resize_window` knows."""


def resize_window(pixels: np.ndarray, size: tuple[int, int], window: Box, resample: Image.Resampling) -> np.ndarray:
    """uint8 [H, W, C] resized to `size` (height, width), of which `window` (left, top, right, bottom).

    Returns uint8 [bottom - top, right - left, C]. `resample` is one of `RESAMPLING`.
    """
    left, top, right, bottom = window
    height, width = pixels.shape[:2]
    if resample == Image.Resampling.NEAREST:
        return pixels[_nearest(height, size[0], top, bottom)][:, _nearest(width, size[1], left, right)]
    rows, row_weights = _taps(height, size[0], top, bottom, resample)
    columns, column_weights = _taps(width, size[1], left, right, resample)
    pixels = pixels[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    vertical, horizontal = (rows - rows.min(), row_weights), (columns - columns.min(), column_weights)
    if _is_vertical_first((height, width), size):
        return _across(_down(pixels, vertical), horizontal)
    return _down(_across(pixels, horizontal), vertical)


def _is_vertical_first(old: tuple[int, int], new: tuple[int, int]) -> bool:
    """Pillow's choice of the first pass since version 13; it shows, as each pass rounds."""
    shrinks_by = old[0] - new[0]
    return shrinks_by > 0 and shrinks_by > 2 * (old[1] - new[1])


def _nearest(in_size: int, out_size: int, start: int, stop: int) -> np.ndarray:
    """Source indices of outputs `start` to `stop`, by the running sum of ImagingScaleAffine."""
    steps = np.full(stop, in_size / out_size)
    steps[0] *= 0.5
    return np.minimum(steps.cumsum()[start:].astype(np.int64), in_size - 1)


def _taps(in_size: int, out_size: int, start: int, stop: int, resample: Image.Resampling) -> Taps:
    """Taps of outputs `start` to `stop`."""
    kernel, reach = _FILTERS[resample]
    scale = in_size / out_size
    stretch = max(scale, 1.0)
    support = reach * stretch
    centers = (np.arange(start, stop) + 0.5) * scale
    first = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centers + support + 0.5).astype(np.int64), in_size)
    indices = first[:, None] + np.arange(int((last - first).max()))
    inside = indices < last[:, None]
    weights = np.where(inside, kernel((indices - centers[:, None] + 0.5) * (1.0 / stretch)), 0.0)
    weights /= weights.cumsum(axis=1)[:, -1:]
    fixed = np.trunc(weights * (1 << PRECISION_BITS) + np.where(weights < 0, -0.5, 0.5)).astype(np.int64)
    return np.minimum(indices, in_size - 1), np.where(inside, fixed, 0)


def _across(pixels: np.ndarray, taps: Taps) -> np.ndarray:
    return _down(pixels.transpose(1, 0, 2), taps).transpose(1, 0, 2)


def _down(lines: np.ndarray, taps: Taps) -> np.ndarray:
    """Weighted sums of lines [n, ...] -> uint8 [outputs, ...]."""
    indices, weights = taps
    total = np.full((indices.shape[0], *lines.shape[1:]), 1 << (PRECISION_BITS - 1), dtype=np.int64)
    for tap in range(indices.shape[1]):
        total += lines[indices[:, tap]].astype(np.int64) * weights[:, tap, None, None]
    return np.clip(total >> PRECISION_BITS, 0, 255).astype(np.uint8)
