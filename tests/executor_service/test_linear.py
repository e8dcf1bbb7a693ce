"""Products of the fused path on CPU, with weights in oneDNN's order beside the plain one, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from executor_service.layers.linear import GatedLinear, Linear


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact(x: Tensor, linear: Linear) -> Tensor:
    product = x.double() @ linear.weight.double().T
    return product if linear.bias is None else product + linear.bias.double()


@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 70), st.booleans())
def test_products(rows: int, features: int, width: int, has_bias: bool) -> None:
    linear = Linear(normal(features, width, seed=1), normal(features, seed=2) if has_bias else None)
    x = normal(rows, width, seed=3)
    got = linear(x)
    assert got.shape == (rows, features)
    torch.testing.assert_close(got.double(), exact(x, linear), rtol=1e-5, atol=1e-4)
    residual = normal(rows, features, seed=4)
    total = residual + got
    torch.testing.assert_close(linear.added_to(x, residual), total, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 3, 16])
def test_a_sum_takes_the_residuals_place(rows: int) -> None:
    """Which slices of many rows rely on."""
    linear, residual = Linear(normal(8, 16, seed=1)), normal(rows, 8, seed=2)
    before = residual.clone()
    total = linear.added_to(normal(rows, 16), residual)
    assert total.data_ptr() == residual.data_ptr()
    assert not torch.equal(residual, before)


def test_the_second_order_is_there_from_the_first() -> None:
    """So that it is in no peak of a step: the ledger counts what was there before."""
    linear = Linear(normal(300, 200))
    assert vars(linear)["_packed"].nbytes >= linear.weight.nbytes


@pytest.mark.parametrize("rows", [1, 2, 3, 16])
def test_gate(rows: int) -> None:
    gated, x = GatedLinear(normal(24, 16, seed=1), normal(24, seed=2)), normal(rows, 16)
    gate, up = exact(x, gated).chunk(2, dim=-1)
    torch.testing.assert_close(gated(x).double(), gate / (1 + (-gate).exp()) * up, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (2, 3), (0, 3)])
def test_products_of_any_shape(shape: tuple[int, int]) -> None:
    """As a tower has them: tiles, and rows of each."""
    linear, x = Linear(normal(8, 16, seed=1), normal(8, seed=2)), normal(*shape, 16)
    torch.testing.assert_close(linear.product(x).double(), exact(x, linear), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_the_librarys_as_they_are(dtype: torch.dtype) -> None:
    linear, x = Linear(normal(8, 16, seed=1).to(dtype)), normal(3, 16).to(dtype)
    assert torch.equal(linear(x), torch.nn.functional.linear(x, linear.weight))
