"""CLIP's activation on a GPU against its formula in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from executor_service.kernels.quick_gelu import quick_gelu
from tests.executor_service.gpu.tensors import DTYPES, ERRORS, SEEDS, close, poison, random

pytestmark = pytest.mark.gpu


@settings(max_examples=60)
@given(st.integers(0, 70), st.sampled_from([1, 7, 8, 640, 4096]), st.booleans(), DTYPES, SEEDS)
def test_quick_gelu(rows: int, width: int, is_shifted: bool, dtype: torch.dtype, seed: int) -> None:
    """Also of tensors that do not begin where a wide access may, and of values at which the exponential overflows."""
    x = random((rows * width + 1,), dtype, seed)[is_shifted : rows * width + is_shifted].view(rows, width)
    x = x * 10 if seed % 2 else x
    if x.numel():
        x.view(-1)[0], x.view(-1)[-1] = 200.0, -200.0
    wide = x.double()
    poison()
    close(quick_gelu(x), wide * torch.sigmoid(1.702 * wide))


@pytest.mark.parametrize("dtype", list(ERRORS))
def test_opcheck(dtype: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.diptych.quick_gelu.default, (random((5, 12), dtype, 0),))
