"""Layer norms on a GPU against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from executor_service.kernels.layer_norm import add_layer_norm, layer_norm
from tests.executor_service.gpu.tensors import DTYPES, ERRORS, SEEDS, close, poison, random

pytestmark = pytest.mark.gpu

EPSILON = 1e-5


def formula(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows = rows.double()
    difference = rows - rows.mean(-1, keepdim=True)
    return difference / (difference.pow(2).mean(-1, keepdim=True) + EPSILON).sqrt() * weight.double() + bias.double()


@settings(max_examples=60)
@given(st.integers(0, 70), st.sampled_from([1, 7, 32, 264, 1000, 1024, 1152, 8192]), st.booleans(), DTYPES, SEEDS)
def test_layer_norm(num_tokens: int, width: int, is_far: bool, dtype: torch.dtype, seed: int) -> None:
    """Also of rows whose mean is far from zero, whose variance is then no small difference of large numbers."""
    x, residual = random((num_tokens, width), dtype, seed) + 8 * is_far, random((num_tokens, width), dtype, seed + 1)
    weight, bias = random((width,), dtype, seed + 2), random((width,), dtype, seed + 3)
    poison()
    close(layer_norm(x, weight, bias, EPSILON), formula(x, weight, bias))
    before, expected = residual.clone(), residual + x
    poison()
    total, normal = add_layer_norm(x, residual, weight, bias, EPSILON)
    assert torch.equal(total, expected)
    assert torch.equal(residual, before)
    close(normal, formula(expected, weight, bias))


@pytest.mark.parametrize("dtype", list(ERRORS))
def test_many_rows(dtype: torch.dtype) -> None:
    """A vision tower's: more rows than there are multiprocessors, in three dimensions."""
    x, residual = random((3, 577, 1024), dtype, 0), random((3, 577, 1024), dtype, 1)
    weight, bias = random((1024,), dtype, 2), random((1024,), dtype, 3)
    poison()
    total, normal = add_layer_norm(x, residual, weight, bias, EPSILON)
    assert torch.equal(total, residual + x)
    close(normal, formula(total, weight, bias))


@pytest.mark.parametrize("dtype", list(ERRORS))
def test_opcheck(dtype: torch.dtype) -> None:
    x, weight = random((5, 12), dtype, 0), random((12,), dtype, 1)
    torch.library.opcheck(torch.ops.diptych.layer_norm.default, (x, weight, weight, EPSILON))
    torch.library.opcheck(torch.ops.diptych.add_layer_norm.default, (x, x.clone(), weight, weight, EPSILON))
