"""The CPU reference of small_linear against plain formulas, and what needs no GPU of its launch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from executor_service.kernels import small_linear as module
from executor_service.kernels.silu_mul import silu_mul
from executor_service.kernels.small_linear import small_linear, small_linear_silu_mul, takes

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@given(st.integers(0, 5), st.integers(1, 20), st.integers(0, 40), DTYPES, st.booleans(), st.booleans())
def test_small_linear(
    rows: int, features: int, width: int, dtype: torch.dtype, has_bias: bool, has_residual: bool
) -> None:
    x, weight = normal(rows, width, dtype=dtype, seed=1), normal(features, width, dtype=dtype, seed=2)
    bias = normal(features, dtype=dtype, seed=3) if has_bias else None
    residual = normal(rows, features, dtype=dtype, seed=4) if has_residual else None
    expected = x.double() @ weight.double().T
    for term in (bias, residual):
        if term is not None:
            expected = expected + term.double()
    got = small_linear(x, weight, bias, residual)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@given(st.integers(0, 5), st.integers(1, 20), st.integers(1, 40), DTYPES)
def test_gate_is_rounded_as_by_two_ops(rows: int, features: int, width: int, dtype: torch.dtype) -> None:
    x, weight = normal(rows, width, dtype=dtype, seed=1), normal(2 * features, width, dtype=dtype, seed=2)
    got = small_linear_silu_mul(x, weight)
    assert torch.equal(got, silu_mul(small_linear(x, weight)))
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=-1)
    expected = gate / (1 + (-gate).exp()) * up
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance * (1 + width) + 1e-5)


def test_widths_must_agree() -> None:
    with pytest.raises(RuntimeError):
        small_linear(normal(2, 8), normal(4, 7))


def test_nothing_on_the_cpu_is_taken() -> None:
    assert not takes(1, torch.zeros((4096, 4096), dtype=torch.bfloat16))


@pytest.mark.parametrize(("rate", "fewest"), [(1.5e12, 2), (3.35e12, 2), (4.8e12, 0)])
def test_variants_by_the_memorys_rate(monkeypatch: pytest.MonkeyPatch, rate: float, fewest: int) -> None:
    monkeypatch.setattr(module, "memory_rate", lambda device: rate)
    # Not what is kept of a real GPU.
    assert module.fewest_rows.__wrapped__(0) == fewest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    x, weight = normal(3, 16, dtype=dtype), normal(6, 16, dtype=dtype, seed=1)
    ops = torch.ops.diptych
    torch.library.opcheck(ops.small_linear.default, (x, weight, None, None))
    extra = normal(6, dtype=dtype), normal(3, 6, dtype=dtype)
    torch.library.opcheck(ops.small_linear.default, (x, weight, *extra))
    torch.library.opcheck(ops.small_linear_silu_mul.default, (x, weight))
