"""The launch of small_linear for up to 128 rows on Hopper (csrc/small_linear_tiles.cu)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Any, Final

import torch
from torch import Tensor

from executor_service.kernels.cuda.module import BY_VALUE, INT, POINTER, dtype_name, kernel
from executor_service.kernels.cuda.tensor_map import tensor_map

MOST_ROWS: Final = 128
_ROWS: Final = (16, 32, 64, 96, 128)
"""That kernels are compiled for."""
_TILE_ROWS: Final = 128
_COLUMNS: Final = 64
_TILE_BYTES: Final = _TILE_ROWS * _COLUMNS * 2
_WARPS: Final = 8
_THREADS: Final = 32 * (_WARPS + 2)
_X_STAGES: Final = 8
"""Or as many as there are of weights: the copy engine brings x behind all the weights that were asked for before it."""
_MOST_X_STAGES: Final = 3
"""Of so many rows that weights need the room more."""
SPLITS: Final = 2
"""Blocks of a cluster: each has so many columns of its tiles."""
_AHEAD_BYTES: Final = 112 * 1024
"""Of weights and x on their way to a block at a time: memory needs no more, and x stands behind the weights."""
_SCRATCH_BYTES: Final = 512 * _WARPS + 16 * _WARPS + 1024
"""Beside the rings and other blocks' sums: to turn elements, barriers, and what aligning takes."""
SHARED_BYTES: Final = 224 * 1024
"""Of every block: one fits on a multiprocessor and small kernels' beside it, and the next kernel's takes its place."""


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

    @property
    def compiled_rows(self) -> int:
        """Of the kernel that has it."""
        return next(rows for rows in _ROWS if rows >= self.rows)


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
    types = (*[BY_VALUE] * 3, *[POINTER] * 3, *[INT] * 7)
    name = f"small_linear_tiles_{dtype_name(shape.dtype)}_{shape.kind}_{shape.compiled_rows}"
    launch = kernel("small_linear_tiles", name, types, SHARED_BYTES, SPLITS, is_dependent=True)
    clusters, units = division(shape.features, _most_clusters(name, types))
    rest = units % shape.units or min(units, shape.units)
    steps = ceil(shape.width / (_COLUMNS * SPLITS))
    num_x_stages, num_stages = stages(shape)
    num_ahead = steps_ahead(shape, min(units, shape.units), num_stages)
    numbers = shape.rows, shape.features, units, steps, num_stages, num_x_stages, num_ahead

    def run(x: Tensor, weight: Tensor, bias: Tensor | int, residual: Tensor | int, out: Tensor) -> None:
        address = weight.data_ptr()
        maps = _weight_map(shape, address, shape.units), _weight_map(shape, address, rest), _x_map(shape, x.data_ptr())
        launch((clusters * SPLITS,), _THREADS, *maps, bias, residual, out, *numbers)

    return run


def division(features: int, most_clusters: int) -> tuple[int, int]:
    """How many clusters there are, and how many features each has (the last perhaps fewer): a multiple of eight."""
    units = 8 * ceil(features / (8 * most_clusters))
    return ceil(features / units), units


def _most_clusters(name: str, types: tuple[Any, ...]) -> int:
    """That run at the same time: a cluster lies within one part of the GPU, and not every part holds whole ones."""
    from cuda.bindings import driver

    alone = kernel("small_linear_tiles", name, types, SHARED_BYTES, SPLITS)
    config = alone.config
    config.gridDimX, config.gridDimY, config.gridDimZ, config.blockDimX = 1024 * SPLITS, 1, 1, _THREADS
    status, count = driver.cuOccupancyMaxActiveClusters(alone.function, config)
    if status.value or not count:
        raise RuntimeError(f"no cluster of {SPLITS} blocks fits on the GPU: {status.name}")
    return int(count)


def stages(shape: Shape) -> tuple[int, int]:
    """Stages of x and tiles of weights that fit beside other blocks' sums, with two barriers of 8 bytes each."""
    own_groups = ceil(shape.compiled_rows / (8 * SPLITS))
    sums_bytes = _WARPS * (SPLITS - 1) * min(own_groups, 2) * 512
    x_bytes, tile_bytes = 8 * ceil(shape.rows / 8) * _COLUMNS * 2 + 16, _TILE_BYTES + 16
    room = SHARED_BYTES - _SCRATCH_BYTES - sums_bytes
    most = _MOST_X_STAGES if shape.compiled_rows == MOST_ROWS else _X_STAGES
    num_x_stages = min(most, room // (x_bytes + tile_bytes))
    return num_x_stages, (room - num_x_stages * x_bytes) // tile_bytes


def steps_ahead(shape: Shape, units: int, num_stages: int) -> int:
    """Whose weights are on their way at a time, of tiles of `units` features; not more than there are stages."""
    weight_rows = units * _TILE_ROWS // shape.units
    step_bytes = (weight_rows + 8 * ceil(shape.rows / 8)) * _COLUMNS * 2
    return max(1, min(num_stages, _AHEAD_BYTES // step_bytes))


def _weight_map(shape: Shape, address: int, units: int) -> object:
    """A tile is a box: rows of the weight, or eight of the gate's and eight of the other half by turns."""
    row_bytes = shape.width * 2
    if shape.kind == "plain":
        return tensor_map(address, shape.dtype, (shape.width, shape.features), (row_bytes,), (_COLUMNS, units))
    sizes = (shape.width, 8, 2, shape.features // 8)
    strides = (row_bytes, shape.features * row_bytes, 8 * row_bytes)
    return tensor_map(address, shape.dtype, sizes, strides, (_COLUMNS, 8, 2, units // 8))


def _x_map(shape: Shape, address: int) -> object:
    box = _COLUMNS, 8 * ceil(shape.rows / 8)
    return tensor_map(address, shape.dtype, (shape.width, shape.rows), (shape.width * 2,), box)
