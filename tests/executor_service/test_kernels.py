"""Ops against plain references, and torch's own checks of their registration."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.activations import QuickGELUActivation

from executor_service.kernels.layer_norm import add_layer_norm, layer_norm
from executor_service.kernels.paged_decode_attention import paged_decode_attention
from executor_service.kernels.quick_gelu import quick_gelu
from executor_service.kernels.rms_norm import add_rms_norm, rms_norm
from executor_service.kernels.rotary_write_kv import rotary_write_kv
from executor_service.kernels.silu_mul import silu_mul
from executor_service.kernels.write_kv import write_kv
from executor_service.layers.attention import paged_attention
from executor_service.layers.context import AttentionMetadata, KVCache
from tests.executor_service.spans import visible_ends


def plain_attention(query, keys, values, first, scale, window, softcap, ends=None):
    """One request: query [n, Hq, D] at positions `first`…, keys and values [L, Hkv, D]; float64, no tricks.

    `ends` [n]: how many tokens each query sees, where that is not up to itself.
    """
    repeats = query.shape[1] // keys.shape[1]
    out = torch.empty_like(query)
    for row in range(query.shape[0]):
        position = first + row
        start = max(0, position + 1 - window) if window else 0
        end = position + 1 if ends is None else ends[row]
        for head in range(query.shape[1]):
            k, v = (t[start:end, head // repeats] for t in (keys, values))
            scores = (k @ query[row, head]) * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            out[row, head] = scores.softmax(0) @ v
    return out


def paged(lengths, chunks, heads, kv_heads, dim, block_size, seed):
    """Random requests with shuffled blocks; unused slots hold large numbers that nobody may see."""
    generator = torch.Generator().manual_seed(seed)
    tables_needed = [-(-length // block_size) for length in lengths]
    num_blocks = sum(tables_needed) + 3
    order = torch.randperm(num_blocks, generator=generator).tolist()
    k_cache, v_cache = (torch.full((num_blocks, block_size, kv_heads, dim), 1e3, dtype=torch.float64) for _ in "kv")
    tables = torch.zeros((len(lengths), max(tables_needed)), dtype=torch.int32)
    rows = []
    for index, length in enumerate(lengths):
        blocks = [order.pop() for _ in range(tables_needed[index])]
        tables[index, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        keys, values = (torch.randn(length, kv_heads, dim, generator=generator, dtype=torch.float64) for _ in "kv")
        slots = torch.tensor([blocks[t // block_size] * block_size + t % block_size for t in range(length)])
        write_kv(keys, values, k_cache, v_cache, slots)
        query = torch.randn(chunks[index], heads, dim, generator=generator, dtype=torch.float64)
        rows.append((query, keys, values))
    return rows, k_cache, v_cache, tables


@st.composite
def batches(draw):
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (2, 3), (1, 4)]))
    requests = draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=5))
    decodes = draw(st.lists(st.integers(1, 40), max_size=4))
    lengths = decodes + [max(pair) for pair in requests]
    chunks = [1] * len(decodes) + [min(pair) for pair in requests]
    return (
        lengths,
        chunks,
        kv_heads * group,
        kv_heads,
        draw(st.sampled_from([4, 16])),
        draw(st.sampled_from([1, 4, 16])),
    )


@settings(max_examples=60)
@given(batches(), st.booleans(), st.sampled_from([0, 1, 5, 17]), st.sampled_from([0.0, 3.0]), st.integers(0, 2**16))
def test_paged_attention_equals_plain_attention(batch, has_spans, window, softcap, seed) -> None:
    lengths, chunks, heads, kv_heads, dim, block_size = batch
    rows, k_cache, v_cache, tables = paged(lengths, chunks, heads, kv_heads, dim, block_size, seed)
    cu_seqlens = torch.tensor([0, *torch.tensor(chunks).cumsum(0).tolist()], dtype=torch.int32)
    query = torch.cat([row[0] for row in rows])
    num_decodes = next((row for row, size in enumerate(chunks) if size > 1), len(chunks))
    cached = [length - size for length, size in zip(lengths, chunks, strict=True)]
    ends = visible_ends(zip(chunks, cached, strict=True), seed) if has_spans else None
    metadata = AttentionMetadata(
        torch.empty(0), cu_seqlens, torch.tensor(lengths, dtype=torch.int32), tables, num_decodes, max(chunks), ends
    )
    got = paged_attention(query, KVCache(k_cache, v_cache), metadata, 0.3, window, softcap)
    for index, (q, k, v) in enumerate(rows):
        rows_of = slice(cu_seqlens[index], cu_seqlens[index + 1])
        own_ends = None if ends is None else ends[rows_of].tolist()
        expected = plain_attention(q, k, v, cached[index], 0.3, window, softcap, own_ends)
        torch.testing.assert_close(got[rows_of], expected, atol=1e-12, rtol=1e-10)


def test_a_decode_without_tokens_is_zero() -> None:
    rows, k_cache, v_cache, tables = paged([5, 3], [1, 1], 2, 1, 4, 4, 0)
    query, out = torch.cat([row[0] for row in rows]), torch.full((2, 2, 4), float("nan"), dtype=torch.float64)
    lengths = torch.tensor([5, 0], dtype=torch.int32)
    paged_decode_attention(query, k_cache, v_cache, tables, lengths, 0.3, 0, 0.0, out)
    torch.testing.assert_close(out[:1], plain_attention(*rows[0], 4, 0.3, 0, 0.0), atol=1e-12, rtol=1e-10)
    assert (out[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ops_are_registered_properly(dtype) -> None:
    rows, k_cache, v_cache, tables = paged([9, 20], [1, 6], 4, 2, 8, 4, 0)
    query = torch.cat([row[0] for row in rows]).to(dtype)
    k_cache, v_cache = k_cache.to(dtype), v_cache.to(dtype)
    starts, lengths = torch.tensor([0, 1, 7], dtype=torch.int32), torch.tensor([9, 20], dtype=torch.int32)
    caches, out = (k_cache, v_cache, tables), torch.empty_like(query)
    torch.library.opcheck(
        torch.ops.diptych.paged_decode_attention.default, (query[:2], *caches, lengths, 0.3, 0, 0.0, out[:2].clone())
    )
    prefill = (query, *caches, starts, lengths, 6, 0.3, 0, 0.0, out)
    torch.library.opcheck(torch.ops.diptych.paged_prefill_attention.default, prefill)
    ends = visible_ends([(1, 8), (6, 14)], 0)
    torch.library.opcheck(torch.ops.diptych.paged_prefill_attention.default, (*prefill, ends))
    key = torch.randn(3, 2, 8).to(dtype)
    torch.library.opcheck(
        torch.ops.diptych.write_kv.default, (key, key.clone(), k_cache, v_cache, torch.tensor([0, 5, 11]))
    )
    x, weight = torch.randn(5, 12).to(dtype), torch.randn(12).to(dtype)
    torch.library.opcheck(torch.ops.diptych.rms_norm.default, (x, weight, 1e-5))
    torch.library.opcheck(torch.ops.diptych.add_rms_norm.default, (x, x.clone(), weight, 1e-5))
    torch.library.opcheck(torch.ops.diptych.layer_norm.default, (x, weight, weight, 1e-5))
    torch.library.opcheck(torch.ops.diptych.add_layer_norm.default, (x, x.clone(), weight, weight, 1e-5))
    torch.library.opcheck(torch.ops.diptych.silu_mul.default, (x,))
    torch.library.opcheck(torch.ops.diptych.quick_gelu.default, (x,))
    qkv, angles = torch.randn(3, (4 + 2 * 2) * 8).to(dtype), torch.randn(3, 8).to(dtype)
    torch.library.opcheck(
        torch.ops.diptych.rotary_write_kv.default,
        (qkv, torch.tensor([2, 0, 1]), angles, k_cache, v_cache, torch.tensor([0, -1, 11])),
    )


def test_quick_gelu_equals_transformers() -> None:
    x = 5 * torch.randn(7, 9, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    assert torch.equal(quick_gelu(x), QuickGELUActivation()(x))


DTYPES = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 2**-7}
"""And the error that each is allowed, relative to the largest value: normalising is always float32 inside."""


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Compares with a float64 reference."""
    assert got.shape == expected.shape
    error = (got.double() - expected).abs().max() if got.numel() else torch.tensor(0.0)
    assert error <= DTYPES[got.dtype] * max(expected.abs().max().item() if got.numel() else 0.0, 1.0)


@settings(max_examples=30)
@given(
    st.integers(0, 9), st.sampled_from([2, 8, 30]), st.sampled_from(list(DTYPES)), st.sampled_from([1e-5, 1e-6]),
    st.integers(0, 2**16),
)  # fmt: skip
def test_rms_norm_equals_its_formula(num_tokens, width, dtype, epsilon, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, residual = torch.randn(2, num_tokens, width, generator=generator).to(dtype)
    weight = torch.randn(width, generator=generator).to(dtype)

    def formula(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.double()
        return weight.double() * rows / (rows.pow(2).mean(-1, keepdim=True) + epsilon).sqrt()

    close(rms_norm(x, weight, epsilon), formula(x))
    total = x + residual
    close(add_rms_norm(x, residual, weight, epsilon), formula(total))
    assert torch.equal(residual, total), "the sum is left in place"


@settings(max_examples=20)
@given(st.integers(0, 9), st.sampled_from([8, 30]), st.sampled_from(list(DTYPES)), st.integers(0, 2**16))
def test_layer_norm_equals_its_formula(num_tokens, width, dtype, seed) -> None:
    """Not for two features: where they are nearly equal their difference is rounding alone, in any float32."""
    generator = torch.Generator().manual_seed(seed)
    x, residual = torch.randn(2, num_tokens, width, generator=generator).to(dtype)
    weight, bias = torch.randn(2, width, generator=generator).to(dtype)

    def formula(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.double()
        difference = rows - rows.mean(-1, keepdim=True)
        scale = (difference.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
        return difference * scale * weight.double() + bias.double()

    close(layer_norm(x, weight, bias, 1e-5), formula(x))
    before = residual.clone()
    total, normal = add_layer_norm(x, residual, weight, bias, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(residual, before), "inputs are left alone"
    close(normal, formula(total))


@settings(max_examples=20)
@given(st.integers(0, 9), st.sampled_from([1, 8, 30]), st.sampled_from(list(DTYPES)), st.integers(0, 2**16))
def test_silu_mul_equals_its_formula(num_tokens, width, dtype, seed) -> None:
    gate_up = (3 * torch.randn(num_tokens, 2 * width, generator=torch.Generator().manual_seed(seed))).to(dtype)
    before = gate_up.clone()
    gate, up = gate_up.double().chunk(2, dim=-1)
    close(silu_mul(gate_up), gate / (1 + (-gate).exp()) * up)
    assert torch.equal(gate_up, before), "the input is left alone"


@settings(max_examples=30)
@given(
    st.integers(0, 9), st.sampled_from([(1, 1), (4, 2), (3, 3)]), st.sampled_from([2, 8]), st.sampled_from([1, 4]),
    st.sampled_from(list(DTYPES)), st.integers(0, 2**16),
)  # fmt: skip
def test_rotary_write_kv_turns_pairs_and_stores(num_tokens, heads, dim, block_size, dtype, seed) -> None:
    """Against complex numbers: element i and element i + D / 2 are a point that the angle turns."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, dim, generator=generator).to(dtype)
    angles = torch.randn(20, dim // 2, generator=generator, dtype=torch.float64)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)
    positions = torch.randint(20, (num_tokens,), generator=generator)
    k_cache, v_cache = (torch.full((12, block_size, num_kv_heads, dim), 7.0).to(dtype) for _ in "kv")
    slots = torch.randperm(12 * block_size, generator=generator)[:num_tokens]
    is_stored = torch.rand(num_tokens, generator=generator) < 0.8
    query = rotary_write_kv(qkv.flatten(1), positions, cos_sin, k_cache, v_cache, slots.where(is_stored, -1))

    turns = torch.complex(*cos_sin[positions].double().chunk(2, dim=-1))[:, None]
    points = torch.complex(*qkv.double().chunk(2, dim=-1)) * turns
    turned = torch.cat([points.real, points.imag], dim=-1)
    close(query, turned[:, :num_heads])
    keys, values = (cache.view(-1, num_kv_heads, dim) for cache in (k_cache, v_cache))
    qkv, turned, slots = qkv[is_stored], turned[is_stored], slots[is_stored]
    close(keys[slots], turned[:, num_heads : num_heads + num_kv_heads])
    assert torch.equal(values[slots], qkv[:, num_heads + num_kv_heads :])
    others = torch.ones(12 * block_size, dtype=torch.bool).index_fill_(0, slots, False)
    assert (keys[others] == 7).all()
    assert (values[others] == 7).all()
