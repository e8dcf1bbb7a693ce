"""Random inputs on the GPU, and comparison with what a formula gives in float64."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

ERRORS = {torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}
"""What each dtype may be away from the formula, relative to the largest value: two roundings of its last bit."""
DTYPES = st.sampled_from(list(ERRORS))
SEEDS = st.integers(0, 2**16)


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Normally distributed; the same on every machine."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).cuda()


def close(got: Tensor, expected: Tensor) -> None:
    """`expected` float64; NaN is never close."""
    assert got.shape == expected.shape
    if got.numel():
        error = (got.double() - expected).abs().max().item()
        assert error <= ERRORS[got.dtype] * max(expected.abs().max().item(), 1.0)


def poison() -> None:
    """Memory that the next outputs are made of holds no leftovers that happen to be right.

    Of every size, for torch gives out the smallest freed piece that is large enough: each that it keeps, and new ones.
    """
    snapshot = torch.cuda.memory_snapshot()
    kept = [block["size"] for segment in snapshot for block in segment["blocks"] if block["state"] == "inactive"]
    sizes = sorted(kept, reverse=True) + [4 << power for power in range(7, 22) for _ in range(8)]
    pieces = [torch.full((size // 4,), float("nan"), device="cuda") for size in sizes]
    del pieces
