"""CUDA kernels against float64 formulas: random shapes, dtypes, tails, empty rows, poisoned outputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from executor_service.kernels.cuda.code import sources
from executor_service.kernels.cuda.module import load_all
from executor_service.kernels.normalize import normalize
from executor_service.kernels.rms_norm import add_rms_norm, rms_norm
from executor_service.kernels.rotary_write_kv import rotary_write_kv
from executor_service.kernels.silu_mul import silu_mul
from executor_service.kernels.write_kv import write_kv
from registry import Normalization
from tests.executor_service.gpu.tensors import DTYPES, ERRORS, SEEDS, close, poison, random

pytestmark = pytest.mark.gpu


def test_all_load() -> None:
    seen: list[tuple[int, int]] = []
    assert load_all(lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(sources()), len(sources()))


@settings(max_examples=60)
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


@settings(max_examples=40)
@given(st.integers(0, 70), st.sampled_from([1, 5, 8, 1000, 11008]), DTYPES, SEEDS)
def test_silu_mul(num_tokens: int, width: int, dtype: torch.dtype, seed: int) -> None:
    gate_up = 3 * random((num_tokens, 2 * width), dtype, seed)
    gate, up = gate_up.double().chunk(2, dim=-1)
    poison()
    close(silu_mul(gate_up), gate / (1 + (-gate).exp()) * up)


def test_many_rows() -> None:
    """More rows than there are multiprocessors, with rows of the fewest and the most accesses."""
    dtype = torch.bfloat16
    for rows, width in ((1000, 4096), (600, 5120), (700, 33), (530, 32768)):
        x, residual = random((rows, width), dtype, 0), random((rows, width), dtype, 1)
        weight, total = random((width,), dtype, 2), x + residual
        wide = total.double()
        expected = weight.double() * wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        poison()
        close(add_rms_norm(x, residual, weight, 1e-5), expected)
        assert torch.equal(residual, total)
        gate_up = random((rows, 2 * width), dtype, 3)
        gate, up = gate_up.double().chunk(2, dim=-1)
        poison()
        close(silu_mul(gate_up), gate / (1 + (-gate).exp()) * up)


def test_silu_mul_far_from_zero() -> None:
    """Where the exponential overflows or vanishes."""
    gate = torch.tensor([-1e4, -1000, -100, -89, -88, -60, 60, 100, 1000, 1e4], device="cuda")
    for dtype in ERRORS:
        row = gate.repeat(8).to(dtype)
        expected = torch.where(row > 0, row, 0).double()
        close(silu_mul(torch.cat([row, torch.ones_like(row)])[None])[0], expected)
        close(silu_mul(torch.stack([row, torch.ones_like(row)], dim=1))[:, 0], expected)


def some_slots(num_tokens: int, num_slots: int, seed: int) -> Tensor:
    """Unique, shuffled, one in five of them -1."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(num_slots, generator=generator)[:num_tokens]
    return slots.where(torch.rand(num_tokens, generator=generator) < 0.8, -1).cuda()


@settings(max_examples=60)
@given(
    st.sampled_from([0, 1, 2, 17, 70, 600]), st.sampled_from([(1, 1), (4, 2), (32, 8), (32, 32), (7, 1), (0, 4)]),
    st.sampled_from([2, 10, 16, 64, 80, 128, 256]), st.sampled_from([1, 16]), DTYPES, SEEDS,
)  # fmt: skip
def test_rotary_write_kv(num_tokens: int, heads, head_dim: int, block_size: int, dtype: torch.dtype, seed: int) -> None:
    """As on the CPU in float64, and no slot but those of the batch is written."""
    num_heads, num_kv_heads = heads
    qkv = random((num_tokens, (num_heads + 2 * num_kv_heads) * head_dim), dtype, seed)
    angles = random((50, head_dim // 2), torch.float32, seed + 1)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)
    positions = torch.randint(50, (num_tokens,), generator=torch.Generator().manual_seed(seed)).cuda()
    num_blocks = 620 // block_size + 1
    caches = [torch.full((num_blocks, block_size, num_kv_heads, head_dim), 7.0, dtype=dtype).cuda() for _ in "kv"]
    slots = some_slots(num_tokens, num_blocks * block_size, seed)
    expected = [cache.double().cpu() for cache in caches]
    query = rotary_write_kv(qkv.double().cpu(), positions.cpu(), cos_sin.double().cpu(), *expected, slots.cpu())
    poison()
    close(rotary_write_kv(qkv, positions, cos_sin, *caches, slots).cpu(), query)
    check_caches(caches, expected, slots)


def check_caches(caches: list[Tensor], expected: list[Tensor], slots: Tensor) -> None:
    """`caches` were full of 7."""
    for cache, reference in zip(caches, expected, strict=True):
        close(cache.cpu(), reference)
    untouched = torch.ones(caches[0].shape[0] * caches[0].shape[1], dtype=torch.bool)
    untouched[slots[slots >= 0].cpu()] = False
    for cache in caches:
        assert (cache.cpu().flatten(0, 1)[untouched] == 7).all()


@settings(max_examples=30)
@given(
    st.sampled_from([0, 1, 5, 70]), st.sampled_from([1, 3, 8]), st.sampled_from([1, 5, 64, 128]), DTYPES, DTYPES, SEEDS
)
def test_write_kv(
    num_tokens: int, heads: int, head_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype, seed: int
) -> None:
    # As the stock path has them: heads before tokens.
    key, value = (random((heads, num_tokens, head_dim), dtype, seed + i).transpose(0, 1) for i in range(2))
    caches = [torch.full((30, 4, heads, head_dim), 7.0, dtype=cache_dtype).cuda() for _ in "kv"]
    slots = some_slots(num_tokens, 120, seed)
    expected = [cache.cpu() for cache in caches]
    write_kv(key.cpu(), value.cpu(), *expected, slots.cpu())
    write_kv(key, value, *caches, slots)
    for cache, reference in zip(caches, expected, strict=True):
        assert torch.equal(cache.cpu(), reference)


@settings(max_examples=30)
@given(
    st.sampled_from([(3, 5, 7), (3, 16, 16), (0, 3, 4, 4), (2, 3, 336, 336), (1, 3, 30, 40), (50, 3)]),
    st.integers(-3, -1), st.booleans(), DTYPES, SEEDS,
)  # fmt: skip
def test_normalize(shape: tuple[int, ...], axis: int, is_line: bool, dtype: torch.dtype, seed: int) -> None:
    """Bit for bit as on the CPU, whichever axis has the channels, and whether the table is a straight line or not."""
    axis = max(axis, -len(shape))
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    table = torch.randn(shape[axis], 256, generator=generator)
    if is_line:
        table = torch.from_numpy(Normalization(1 / 255, (0.4,) * shape[axis], (0.3,) * shape[axis]).table.copy())
    poison()
    got = normalize(levels.cuda(), table.cuda(), axis % len(shape), dtype)
    assert torch.equal(got.cpu(), normalize(levels, table, axis % len(shape), dtype))


@pytest.mark.parametrize("dtype", list(ERRORS))
def test_opcheck(dtype: torch.dtype) -> None:
    x, weight = random((5, 64), dtype, 0), random((64,), dtype, 1)
    torch.library.opcheck(torch.ops.diptych.rms_norm.default, (x, weight, 1e-5))
    torch.library.opcheck(torch.ops.diptych.add_rms_norm.default, (x, x.clone(), weight, 1e-5))
    torch.library.opcheck(torch.ops.diptych.silu_mul.default, (x,))
    cache = torch.zeros((3, 4, 2, 8), dtype=dtype, device="cuda")
    cos_sin, positions, slots = (
        random((3, 8), dtype, 2),
        torch.tensor([2, 0, 1]).cuda(),
        torch.tensor([0, -1, 11]).cuda(),
    )
    key = random((3, 2, 8), dtype, 4)
    torch.library.opcheck(torch.ops.diptych.write_kv.default, (key, key.clone(), cache, cache.clone(), slots))
    levels = torch.randint(256, (2, 3, 4), dtype=torch.uint8, device="cuda")
    torch.library.opcheck(torch.ops.diptych.normalize.default, (levels, torch.randn(3, 256).cuda(), 1, dtype))
    arguments = (random((3, 64), dtype, 3), positions, cos_sin, cache, cache.clone(), slots)
    torch.library.opcheck(torch.ops.diptych.rotary_write_kv.default, arguments)
