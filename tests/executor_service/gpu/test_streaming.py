"""CUDA kernels against float64 formulas: random shapes, dtypes, tails, empty rows, poisoned outputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from executor_service.kernels.cuda.code import sources
from executor_service.kernels.cuda.module import load_all
from executor_service.kernels.rms_norm import add_rms_norm, rms_norm
from executor_service.kernels.rotary_write_kv import rotary_write_kv
from executor_service.kernels.silu_mul import silu_mul
from tests.executor_service.gpu.tensors import DTYPES, ERRORS, SEEDS, close, poison, random

pytestmark = pytest.mark.gpu


def test_all_load() -> None:
    seen: list[tuple[int, int]] = []
    assert load_all(lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(sources()), len(sources()))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 70), st.sampled_from([1, 7, 32, 264, 1000, 4096, 8192, 16384]), DTYPES, SEEDS)
def test_rms_norm(num_tokens: int, width: int, dtype: torch.dtype, seed: int) -> None:
    x, residual = random((num_tokens, width), dtype, seed), random((num_tokens, width), dtype, seed + 1)
    weight = random((width,), dtype, seed + 2)

    def formula(rows: Tensor) -> Tensor:
        rows = rows.double()
        return weight.double() * rows / (rows.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()

    poison()
    close(rms_norm(x, weight, 1e-5), formula(x))
    total = x + residual
    poison()
    close(add_rms_norm(x, residual, weight, 1e-5), formula(total))
    assert torch.equal(residual, total)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 70), st.sampled_from([1, 5, 8, 1000, 11008]), DTYPES, SEEDS)
def test_silu_mul(num_tokens: int, width: int, dtype: torch.dtype, seed: int) -> None:
    gate_up = 3 * random((num_tokens, 2 * width), dtype, seed)
    gate, up = gate_up.double().chunk(2, dim=-1)
    poison()
    close(silu_mul(gate_up), gate / (1 + (-gate).exp()) * up)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 70), st.sampled_from([(1, 1), (4, 2), (32, 8), (32, 32)]), st.sampled_from([2, 10, 64, 128]),
    st.sampled_from([1, 16]), DTYPES, SEEDS,
)  # fmt: skip
def test_rotary_write_kv(num_tokens: int, heads, head_dim: int, block_size: int, dtype: torch.dtype, seed: int) -> None:
    """As on the CPU in float64, and no slot but those of the batch is written."""
    num_heads, num_kv_heads = heads
    qkv = random((num_tokens, (num_heads + 2 * num_kv_heads) * head_dim), dtype, seed)
    angles = random((num_tokens, head_dim // 2), torch.float32, seed + 1).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    num_blocks = 100 // block_size + 1
    caches = [torch.full((num_blocks, block_size, num_kv_heads, head_dim), 7.0, dtype=dtype).cuda() for _ in "kv"]
    slots = torch.randperm(num_blocks * block_size, generator=torch.Generator().manual_seed(seed))[:num_tokens].cuda()
    expected = [cache.double().cpu() for cache in caches]
    query = rotary_write_kv(
        qkv.double().cpu(), cos.double().cpu(), sin.double().cpu(), *expected, slots.cpu()
    )  # writes `expected` as well
    poison()
    close(rotary_write_kv(qkv, cos, sin, *caches, slots).cpu(), query)
    for cache, reference in zip(caches, expected, strict=True):
        close(cache.cpu(), reference)
    untouched = torch.ones(num_blocks * block_size, dtype=torch.bool)
    untouched[slots.cpu()] = False
    for cache in caches:
        assert (cache.cpu().flatten(0, 1)[untouched] == 7).all()


@pytest.mark.parametrize("dtype", list(ERRORS))
def test_opcheck(dtype: torch.dtype) -> None:
    x, weight = random((5, 64), dtype, 0), random((64,), dtype, 1)
    torch.library.opcheck(torch.ops.diptych.rms_norm.default, (x, weight, 1e-5))
    torch.library.opcheck(torch.ops.diptych.add_rms_norm.default, (x, x.clone(), weight, 1e-5))
    torch.library.opcheck(torch.ops.diptych.silu_mul.default, (x,))
    cache = torch.zeros((3, 4, 2, 8), dtype=dtype, device="cuda")
    angles = random((3, 8), dtype, 2)
    slots = torch.tensor([0, 5, 11]).cuda()
    arguments = (random((3, 64), dtype, 3), angles, angles.clone(), cache, cache.clone(), slots)
    torch.library.opcheck(torch.ops.diptych.rotary_write_kv.default, arguments)
