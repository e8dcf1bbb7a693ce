"""The launch of small_linear for up to 128 rows on Hopper (csrc/small_linear_tiles.cu)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Final

import torch
from torch import Tensor

from executor_service.kernels.cuda.module import BY_VALUE, INT, POINTER, dtype_name, kernel
from executor_service.kernels.cuda.tensor_map import tensor_map

MOST_ROWS: Final = 128
_ROWS: Final = (16, 32, 64, 96, 128)
"""That kernels are compiled for."""
_COLUMNS: Final = 64
_STAGES: Final = 12
"""At most: more are filled before the first x has come, and x waits for as long."""
_X_STAGES: Final = 8
"""Or as many as there are of weights: the copy engine brings x behind all the weights that were asked for before it."""
SPLITS: Final = 2
"""Blocks of a cluster: each has so many columns of its tiles."""
_AHEAD_WEIGHT_BYTES: Final = 96 * 1024
"""Of weights on their way to a block at a time: memory needs no more, and x stands behind them."""
_AHEAD_BYTES: Final = 144 * 1024
"""With the x that goes with them."""
_WARP_BYTES: Final = 512 + 16
"""Of each that multiplies: to turn elements, and barriers."""
_ALIGNING_BYTES: Final = 1024
SHARED_BYTES: Final = 224 * 1024
"""Of every block: one fits on a multiprocessor and small kernels' beside it, and the next kernel's takes its place."""
_TYPES: Final = (*[BY_VALUE] * 3, *[POINTER] * 3, *[INT] * 8)
"""Maps of whole tiles, of a range's last and of x; bias, residual, out; numbers."""


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
    def rows_each(self) -> int:
        """Of the weight for a feature: gate and up."""
        return 2 if self.kind == "gated" else 1

    @property
    def compiled_rows(self) -> int:
        """Of the kernel that has it."""
        return next(rows for rows in _ROWS if rows >= self.rows)


@dataclass(frozen=True)
class Tile:
    """What a block multiplies at a time: 64 rows of the weight for each warpgroup."""

    shape: Shape
    range: int
    """Features of a cluster."""

    @property
    def num_warpgroups(self) -> int:
        """More where it saves a tile: each reads all of x again, which is as much as the weights of many rows."""
        is_one_tile = self.range <= 128 and self.shape.kind == "plain"
        return 2 if self.shape.compiled_rows <= 64 or is_one_tile else 3

    @property
    def features(self) -> int:
        """Of a whole tile."""
        return 64 * self.num_warpgroups // self.shape.rows_each

    @property
    def rest(self) -> int:
        """Features of the range's last tile."""
        return self.range % self.features or self.features

    @property
    def stage_bytes(self) -> int:
        """Of 64 columns of the weight."""
        return min(self.range, self.features) * self.shape.rows_each * _COLUMNS * 2

    @property
    def x_stage_bytes(self) -> int:
        """Of 64 columns of x."""
        return 8 * ceil(self.shape.rows / 8) * _COLUMNS * 2


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
    clusters, features = division(shape.features, _most_clusters(shape))
    tile = Tile(shape, features)
    launch = kernel("small_linear_tiles", _name(tile), _TYPES, SHARED_BYTES, SPLITS, is_dependent=True)
    steps = ceil(shape.width / (_COLUMNS * SPLITS))
    num_x_stages, num_stages = stages(tile)
    num_ahead = steps_ahead(tile, num_stages)
    numbers = shape.rows, shape.features, features, steps, tile.stage_bytes, num_stages, num_x_stages, num_ahead
    grid, threads, boxes = (clusters * SPLITS,), _threads(tile), (tile.features, tile.rest)

    def run(x: Tensor, weight: Tensor, bias: Tensor | int, residual: Tensor | int, out: Tensor) -> None:
        weight_maps = (_weight_map(shape, weight.data_ptr(), box) for box in boxes)
        launch(grid, threads, *weight_maps, _x_map(shape, x.data_ptr()), bias, residual, out, *numbers)

    return run


def _name(tile: Tile) -> str:
    shape = tile.shape
    return f"small_linear_tiles_{dtype_name(shape.dtype)}_{shape.kind}_{shape.compiled_rows}_{tile.num_warpgroups}"


def _threads(tile: Tile) -> int:
    """Of a block: warps that multiply, and two that ask for copies."""
    return 32 * (4 * tile.num_warpgroups + 2)


def division(features: int, most_clusters: int) -> tuple[int, int]:
    """How many clusters there are, and how many features each has (the last perhaps fewer): a multiple of eight."""
    units = 8 * ceil(features / (8 * most_clusters))
    return ceil(features / units), units


def _most_clusters(shape: Shape) -> int:
    """That run at the same time: a cluster lies within one part of the GPU, and not every part holds whole ones."""
    from cuda.bindings import driver

    tile = Tile(shape, range=8)
    alone = kernel("small_linear_tiles", _name(tile), _TYPES, SHARED_BYTES, SPLITS)
    config = alone.config
    config.gridDimX, config.gridDimY, config.gridDimZ, config.blockDimX = 1024 * SPLITS, 1, 1, _threads(tile)
    status, count = driver.cuOccupancyMaxActiveClusters(alone.function, config)
    if status.value or not count:
        raise RuntimeError(f"no cluster of {SPLITS} blocks fits on the GPU: {status.name}")
    return int(count)


def stages(tile: Tile) -> tuple[int, int]:
    """Stages of x and of weights that fit beside other blocks' sums, with two barriers of 8 bytes each."""
    own_groups, warps = ceil(tile.shape.compiled_rows / (8 * SPLITS)), 4 * tile.num_warpgroups
    sums_bytes = warps * (SPLITS - 1) * min(own_groups, 2) * 512
    x_bytes, weight_bytes = tile.x_stage_bytes + 16, tile.stage_bytes + 16
    room = SHARED_BYTES - _ALIGNING_BYTES - _WARP_BYTES * warps - sums_bytes
    num_x_stages = min(_X_STAGES, room // (x_bytes + weight_bytes))
    return num_x_stages, min(_STAGES, (room - num_x_stages * x_bytes) // weight_bytes)


def steps_ahead(tile: Tile, num_stages: int) -> int:
    """Whose weights are on their way at a time, at least one; not more than there are stages."""
    with_x = _AHEAD_BYTES // (tile.stage_bytes + tile.x_stage_bytes)
    return min(num_stages, with_x, _AHEAD_WEIGHT_BYTES // tile.stage_bytes)


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
