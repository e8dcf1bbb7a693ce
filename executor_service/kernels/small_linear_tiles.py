"""The launch of small_linear for up to 128 rows on Hopper (csrc/small_linear_tiles.cu)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Final

import torch
from torch import Tensor

from executor_service.kernels.cuda.module import BY_VALUE, INT, POINTER, dtype_name, kernel, num_multiprocessors
from executor_service.kernels.cuda.tensor_map import tensor_map

MOST_ROWS: Final = 128
_ROWS: Final = (16, 32, 64, 96, 128)
"""That kernels are compiled for."""
_TILE_ROWS: Final = 128
_COLUMNS: Final = 64
_TILE_BYTES: Final = _TILE_ROWS * _COLUMNS * 2
_WARPS: Final = 8
_THREADS: Final = 32 * (_WARPS + 2)
_SCRATCH_BYTES: Final = 512 * _WARPS + 1024
"""Beside the rings, and for their alignment; barriers count as well."""
_SHARED_BYTES: Final = 227 * 1024
"""Of every block: one fits on a multiprocessor, and the next kernel's takes its place when it ends."""
_CLUSTER: Final = 2
"""Blocks that fetch x together."""
_X_STAGES: Final = 4
_BURST: Final = 1
"""Steps whose weights are asked for together."""
_NUM_FLAGS: Final = 256
"""Sets of flags that launches use in turns: two streams must not share one."""
_KEPT: Final[list[Tensor]] = []


@dataclass(frozen=True)
class Shape:
    """All that a launch depends on beside where its tensors are: `features` are those of the result."""

    kind: str
    rows: int
    features: int
    width: int
    dtype: torch.dtype
    device: int

    @property
    def units(self) -> int:
        """Features of a tile."""
        return _TILE_ROWS // 2 if self.kind == "gated" else _TILE_ROWS


def takes(shape: Shape) -> bool:
    """Whether there is a kernel; addresses are to be multiples of 16."""
    return (
        0 < shape.rows <= MOST_ROWS
        and shape.dtype.itemsize == 2
        and shape.features % 8 == shape.width % 8 == 0
        and shape.width > 0
        and _is_hopper(shape.device)
    )


@cache
def _is_hopper(device: int) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


@cache
def launcher(shape: Shape) -> Callable[..., None]:
    """Takes x, weight, bias, residual, out; of bias and residual 0 where there is none."""
    types = (BY_VALUE, BY_VALUE, *[POINTER] * 5, *[INT] * 7)
    compiled_rows = next(rows for rows in _ROWS if rows >= shape.rows)
    name = f"small_linear_tiles_{dtype_name(shape.dtype)}_{shape.kind}_{compiled_rows}"
    launch = kernel("small_linear_tiles", name, types, _SHARED_BYTES, _CLUSTER, is_dependent=True)
    box_rows = 8 * ceil(shape.rows / (8 * _CLUSTER))
    num_blocks, steps = _num_blocks(shape), ceil(shape.width / _COLUMNS)
    num_stages = _num_stages(box_rows * _CLUSTER)
    numbers = shape.rows, shape.features, steps, _CLUSTER, num_stages, _X_STAGES, _BURST
    num_sums, flags = num_blocks * _TILE_ROWS * compiled_rows, _flags(shape.device)

    def run(x: Tensor, weight: Tensor, bias: Tensor | int, residual: Tensor | int, out: Tensor) -> None:
        sums = torch.empty(num_sums, dtype=torch.float32, device=x.device)
        maps = _weight_map(shape, weight.data_ptr()), _x_map(shape, x.data_ptr(), box_rows)
        launch((num_blocks,), _THREADS, *maps, bias, residual, out, sums, next(flags), *numbers)

    return run


def _num_blocks(shape: Shape) -> int:
    """One per multiprocessor, in whole clusters, as long as there are steps for all."""
    tiles = ceil(shape.features / (shape.units * _CLUSTER))
    return _CLUSTER * min(num_multiprocessors(shape.device) // _CLUSTER, tiles * ceil(shape.width / _COLUMNS))


def _num_stages(x_rows: int) -> int:
    """Tiles of weights that shared memory holds beside those of x, with two barriers of 8 bytes each."""
    x_bytes = _X_STAGES * (x_rows * _COLUMNS * 2 + 16)
    return (_SHARED_BYTES - _SCRATCH_BYTES - x_bytes) // (_TILE_BYTES + 16)


def _weight_map(shape: Shape, address: int) -> object:
    """A tile is a box: rows of the weight, or eight of the gate's and eight of the other half by turns."""
    row_bytes = shape.width * 2
    if shape.kind == "plain":
        return tensor_map(
            address, shape.dtype, (shape.width, shape.features), (row_bytes,), (_COLUMNS, _TILE_ROWS)
        )  # fmt: skip
    sizes = (shape.width, 8, 2, shape.features // 8)
    strides = (row_bytes, shape.features * row_bytes, 8 * row_bytes)
    return tensor_map(address, shape.dtype, sizes, strides, (_COLUMNS, 8, 2, _TILE_ROWS // 16))


def _x_map(shape: Shape, address: int, box_rows: int) -> object:
    return tensor_map(address, shape.dtype, (shape.width, shape.rows), (shape.width * 2,), (_COLUMNS, box_rows))


@cache
def _flags(device: int) -> Iterator[int]:
    """Addresses of sets of zeros, that a launch leaves as zeros: one per warp that multiplies."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("small_linear has to run once before a graph of it is captured")
    set_size = num_multiprocessors(device) * _WARPS
    flags = torch.zeros((_NUM_FLAGS, set_size), dtype=torch.int32, device=f"cuda:{device}")
    torch.cuda.synchronize(device)
    _KEPT.append(flags)
    return itertools.cycle(row.data_ptr() for row in flags)
