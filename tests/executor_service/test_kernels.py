"""Ops against plain references, and torch's own checks of their registration."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from executor_service.kernels.paged_attention import paged_attention
from executor_service.kernels.write_kv import write_kv


def plain_attention(query, keys, values, first, scale, window, softcap):
    """One request: query [n, Hq, D] at positions `first`…, keys and values [L, Hkv, D]; float64, no tricks."""
    repeats = query.shape[1] // keys.shape[1]
    out = torch.empty_like(query)
    for row in range(query.shape[0]):
        position = first + row
        start = max(0, position + 1 - window) if window else 0
        for head in range(query.shape[1]):
            k, v = (t[start : position + 1, head // repeats] for t in (keys, values))
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
    tables = torch.zeros((len(lengths), max(tables_needed)), dtype=torch.int64)
    rows = []
    for index, length in enumerate(lengths):
        blocks = [order.pop() for _ in range(tables_needed[index])]
        tables[index, : len(blocks)] = torch.tensor(blocks)
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


@settings(max_examples=60, deadline=None)
@given(batches(), st.sampled_from([0, 1, 5, 17]), st.sampled_from([0.0, 3.0]), st.integers(0, 2**16))
def test_paged_attention_equals_plain_attention(batch, window, softcap, seed) -> None:
    lengths, chunks, heads, kv_heads, dim, block_size = batch
    rows, k_cache, v_cache, tables = paged(lengths, chunks, heads, kv_heads, dim, block_size, seed)
    cu_seqlens = torch.tensor([0, *torch.tensor(chunks).cumsum(0).tolist()])
    query = torch.cat([row[0] for row in rows])
    got = paged_attention(query, k_cache, v_cache, tables, cu_seqlens, torch.tensor(lengths), 0.3, window, softcap)
    for index, (q, k, v) in enumerate(rows):
        expected = plain_attention(q, k, v, lengths[index] - chunks[index], 0.3, window, softcap)
        torch.testing.assert_close(got[cu_seqlens[index] : cu_seqlens[index + 1]], expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ops_are_registered_properly(dtype) -> None:
    rows, k_cache, v_cache, tables = paged([9, 20], [1, 6], 4, 2, 8, 4, 0)
    query = torch.cat([row[0] for row in rows]).to(dtype)
    k_cache, v_cache = k_cache.to(dtype), v_cache.to(dtype)
    lengths = (torch.tensor([0, 1, 7]), torch.tensor([9, 20]))
    torch.library.opcheck(
        torch.ops.diptych.paged_attention.default, (query, k_cache, v_cache, tables, *lengths, 0.3, 0, 0.0)
    )
    key = torch.randn(3, 2, 8).to(dtype)
    torch.library.opcheck(
        torch.ops.diptych.write_kv.default, (key, key.clone(), k_cache, v_cache, torch.tensor([0, 5, 11]))
    )
