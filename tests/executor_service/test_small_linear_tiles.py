"""How small_linear_tiles cuts its work and adds up: the launch's arithmetic, and the kernel's source on the host."""

from __future__ import annotations

from math import ceil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from executor_service.kernels.small_linear_tiles import (
    MOST_ROWS,
    SHARED_BYTES,
    SPLITS,
    Shape,
    Tile,
    division,
    stages,
    steps_ahead,
)
from tests.executor_service.host_kernels import check_on_host, needs_compiler


@given(st.integers(1, 5000).map(lambda n: 8 * n), st.integers(1, 33))
def test_every_feature_is_in_one_range(features: int, most_clusters: int) -> None:
    clusters, units = division(features, most_clusters)
    assert 1 <= clusters <= most_clusters
    assert units % 8 == 0
    assert (clusters - 1) * units < features <= clusters * units


def test_decoders_are_divided_evenly() -> None:
    """Among 66 clusters, as 132 multiprocessors have: none has much more than its share."""
    for features in (12288, 4096, 11008, 6144, 14336):
        assert division(features, 66)[1] <= 1.04 * features / 66


KINDS = pytest.mark.parametrize("kind", ["plain", "gated"])
RANGES = (8, 64, 96, 128, 136, 192, 200, 448)


def tiles(kind: str, rows: int) -> list[Tile]:
    """Of ranges shorter than a tile, as long and longer."""
    shape = Shape(kind, rows, 4096, 4096, torch.bfloat16, 0)
    return [Tile(shape, features) for features in RANGES]


@KINDS
@pytest.mark.parametrize("rows", range(1, MOST_ROWS + 1))
def test_a_tile_is_64_rows_of_the_weight_for_each_warpgroup(rows: int, kind: str) -> None:
    for tile in tiles(kind, rows):
        each = 2 if kind == "gated" else 1
        assert tile.features * each == 64 * tile.num_warpgroups
        assert tile.stage_bytes == min(tile.range * each, 64 * tile.num_warpgroups) * 128
        assert 0 < tile.rest <= tile.features
        assert (tile.range - tile.rest) % tile.features == 0


@pytest.mark.parametrize(
    ("rows", "features", "num_warpgroups"), [(64, 192, 2), (65, 128, 2), (65, 136, 3), (128, 192, 3)]
)
def test_many_rows_of_x_are_read_for_fewer_tiles(rows: int, features: int, num_warpgroups: int) -> None:
    assert Tile(Shape("plain", rows, 4096, 4096, torch.bfloat16, 0), features).num_warpgroups == num_warpgroups


@KINDS
@pytest.mark.parametrize("rows", range(1, MOST_ROWS + 1))
def test_rings_fit_and_hold_enough(rows: int, kind: str) -> None:
    """Behind the rings there is as much as a warpgroup reads beyond a copy of eight rows."""
    for tile in tiles(kind, rows):
        num_x_stages, num_stages = stages(tile)
        warps = 4 * tile.num_warpgroups
        barriers = 16 * (num_x_stages + num_stages + warps)
        others_sums = warps * (SPLITS - 1) * min(2, ceil(tile.shape.compiled_rows / (8 * SPLITS))) * 512
        rings = num_x_stages * ceil(rows / 8) * 1024 + num_stages * tile.stage_bytes
        assert 1023 + rings + others_sums + warps * 512 + barriers <= SHARED_BYTES
        assert others_sums + warps * 512 >= 56 * 128
        assert num_stages >= num_x_stages >= 5


@KINDS
@pytest.mark.parametrize("rows", range(1, MOST_ROWS + 1))
def test_copies_run_ahead_but_not_around_the_ring(rows: int, kind: str) -> None:
    """Who waits for a copy that is further back than the ring is long waits for ever."""
    for tile in tiles(kind, rows):
        _, num_stages = stages(tile)
        ahead = steps_ahead(tile, num_stages)
        assert 3 <= ahead <= num_stages
        assert ahead * tile.stage_bytes <= 96 * 1024
        assert ahead * (tile.stage_bytes + rows * 128) <= 144 * 1024


@needs_compiler
def test_blocks_add_up_in_their_order(tmp_path: Path) -> None:
    check_on_host(
        tmp_path, "small_linear_exchange.cpp", "small_linear_tiles.cuh", ("small_linear_parts.cuh", "warpgroup.cuh")
    )
