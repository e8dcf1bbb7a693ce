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


@pytest.mark.parametrize("rows", range(1, MOST_ROWS + 1))
def test_rings_fit_and_hold_enough(rows: int) -> None:
    shape = Shape("plain", rows, 4096, 4096, torch.bfloat16, 0)
    num_x_stages, num_stages = stages(shape)
    barriers = 16 * (num_x_stages + num_stages + 8)
    others_sums = 8 * (SPLITS - 1) * min(2, ceil(shape.compiled_rows / (8 * SPLITS))) * 512
    bytes_used = num_x_stages * ceil(rows / 8) * 1024 + num_stages * 128 * 128 + others_sums + 8 * 512 + barriers
    assert 1023 + bytes_used <= SHARED_BYTES
    assert num_stages >= 7


@pytest.mark.parametrize("kind", ["plain", "gated"])
@pytest.mark.parametrize("rows", range(1, MOST_ROWS + 1))
def test_copies_run_ahead_but_not_around_the_ring(rows: int, kind: str) -> None:
    """Who waits for a copy that is further back than the ring is long waits for ever."""
    shape = Shape(kind, rows, 4096, 4096, torch.bfloat16, 0)
    _, num_stages = stages(shape)
    for units in range(8, shape.units + 1, 8):
        ahead = steps_ahead(shape, units, num_stages)
        assert 3 <= ahead <= num_stages
        assert ahead * (units * 128 // shape.units + rows) * 128 <= 112 * 1024


@needs_compiler
def test_blocks_add_up_in_their_order(tmp_path: Path) -> None:
    check_on_host(
        tmp_path, "small_linear_exchange.cpp", "small_linear_tiles.cuh", ("small_linear_parts.cuh", "warpgroup.cuh")
    )
