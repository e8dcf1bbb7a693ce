"""uint8 tiles to the rows of a vision tower's first matrix product: normalised, rounded and unfolded, in one pass."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Final

import torch
from torch import Tensor

from executor_service.kernels.cuda.module import (
    BY_VALUE,
    INT,
    LONG,
    POINTER,
    Kernel,
    dtype_name,
    kernel,
    num_multiprocessors,
)
from executor_service.kernels.library import define_op

_THREADS: Final = 256
_WIDE_THREADS: Final = 480
"""At most, but for rows that need more: fewer were slower at any number of tiles (docs/notes/streaming.md)."""
_MAX_THREADS: Final = 512
_MAX_SHARED_BYTES: Final = 96 * 1024
"""Of one block, which every GPU from sm_80 on has."""
_LEVELS: Final = 256
MAX_DIVIDED: Final = 1 << 16
"""No number that the kernel divides by multiplying, nor a divisor, is as large."""


class Divisor(ctypes.Structure):
    """`value`, from 2 on, and what the kernel multiplies by to divide by it: the upper 32 bits of a product."""

    _fields_ = (("value", ctypes.c_uint32), ("reciprocal", ctypes.c_uint32))

    def __init__(self, value: int) -> None:
        super().__init__(value, -(-(1 << 32) // value))


class _WideShape(ctypes.Structure):
    """`Shape` of csrc/image_patches.cu, an argument by value."""

    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("num_channels", "height", "width", "columns", "pitch")),
        *((name, Divisor) for name in ("patch", "packs", "row_packs", "channel_packs")),
    )

    def getPtr(self) -> int:  # noqa: N802 - what cuda-bindings asks of an argument
        return ctypes.addressof(self)


def image_patches(tiles: Tensor, table: Tensor, patch: int, columns: int, dtype: torch.dtype) -> Tensor:
    """uint8 `tiles` [N, C, H, W] -> `dtype` [N * (H // patch) * (W // patch), columns].

    Row by row the patches of each tile, pixels beyond the last whole patch left out; column (c * patch + y) * patch + x
    is `table[c, level]` of pixel (y, x) of channel c, as the weight of a convolution without padding has it, and the
    columns from C * patch * patch on are 0. `table` is float32 [C, 256], see `normalize`; on a GPU it is not the work
    of the kernel just before, which may still run when it is read.
    """
    result: Tensor = IMAGE_PATCHES(tiles, table, patch, columns, dtype)
    return result


def _cpu(tiles: Tensor, table: Tensor, patch: int, columns: int, dtype: torch.dtype) -> Tensor:
    num_tiles, num_channels, height, width = tiles.shape
    grid_height, grid_width = height // patch, width // patch
    tiles = tiles[:, :, : grid_height * patch, : grid_width * patch]
    grid = tiles.reshape(num_tiles, num_channels, grid_height, patch, grid_width, patch).permute(0, 2, 4, 1, 3, 5)
    out = torch.zeros(num_tiles * grid_height * grid_width, columns, dtype=dtype, device=tiles.device)
    pixels = out[:, : num_channels * patch * patch].unflatten(1, (num_channels, patch * patch))
    for channel, values in enumerate(table.to(dtype)):
        levels = grid[:, :, :, channel].reshape(-1).to(torch.int32)
        pixels[:, channel] = values.index_select(0, levels).view(-1, patch * patch)
    return out


def _cuda(tiles: Tensor, table: Tensor, patch: int, columns: int, dtype: torch.dtype) -> Tensor:
    out = _fake(tiles, table, patch, columns, dtype)
    if not out.numel():
        return out
    tiles = tiles.contiguous()
    shape = (*tiles.shape[1:], patch, columns)
    wide = _wide_variant(dtype, *shape) if tiles.data_ptr() % 16 == 0 else None
    if wide is None:
        name, types = f"image_patches_{dtype_name(dtype)}_single", (POINTER,) * 3 + (INT,) * 5 + (LONG,)
        blocks = min(-(-out.numel() // _THREADS), 16 * num_multiprocessors(out.device.index))
        kernel("image_patches", name, types, is_dependent=True)(
            (blocks,), _THREADS, tiles, table, out, *shape, out.numel()
        )
        return out
    launch, threads, wide_shape = wide
    launch((len(tiles) * (tiles.shape[2] // patch),), threads, tiles, table, out, wide_shape)
    return out


@cache
def _wide_variant(
    dtype: torch.dtype, num_channels: int, height: int, width: int, patch: int, columns: int
) -> tuple[Kernel, int, _WideShape] | None:
    """The kernel of 16-byte accesses, its threads, and the shape as it takes it; None: does not fit."""
    count = 16 // dtype.itemsize
    packs, row_packs, channel_packs = columns // count, width // 16, width // 16 * patch
    # An odd number of 16-byte units: then the rows of a patch are in different banks.
    pitch = (row_packs | 1) * 16
    num_bytes = num_channels * (_LEVELS * dtype.itemsize + patch * pitch)
    is_aligned = not (width % 16 or patch % 2 or columns % count) and min(packs, row_packs) > 1
    fits = num_bytes <= _MAX_SHARED_BYTES and packs <= _MAX_THREADS and max(columns, height, width) < MAX_DIVIDED
    if not (is_aligned and fits) or columns < num_channels * patch * patch:
        return None
    shape = _WideShape(
        num_channels, height, width, columns, pitch, *map(Divisor, (patch, packs, row_packs, channel_packs))
    )
    threads = max(1, _WIDE_THREADS // packs) * packs
    name, types = f"image_patches_{dtype_name(dtype)}_wide", (POINTER,) * 3 + (BY_VALUE,)
    return kernel("image_patches", name, types, shared_bytes=num_bytes, is_dependent=True), threads, shape


def _fake(tiles: Tensor, table: Tensor, patch: int, columns: int, dtype: torch.dtype) -> Tensor:
    num_tiles, num_channels, height, width = tiles.shape
    torch._check(tiles.dtype == torch.uint8)
    torch._check(table.shape[0] == num_channels)
    torch._check(columns >= num_channels * patch * patch)
    return tiles.new_empty((num_tiles * (height // patch) * (width // patch), columns), dtype=dtype)


IMAGE_PATCHES: Final = define_op(
    "image_patches(Tensor tiles, Tensor table, int patch, int columns, ScalarType dtype) -> Tensor",
    cpu=_cpu,
    fake=_fake,
    cuda=_cuda,
)
