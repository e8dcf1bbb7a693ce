"""Attention of a ragged batch of query chunks over the paged KV cache."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from executor_service.kernels.library import define_op
from executor_service.kernels.paged_rows import attend, gather_rows


def paged_prefill_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens: Tensor,
    seq_lens: Tensor,
    max_query_len: int,
    scale: float,
    sliding_window: int,
    softcap: float,
    out: Tensor,
) -> None:
    """`query` [T, Hq, D] -> `out` [T, Hq, D], contiguous; rows outside of all chunks are left as they are.

    Request r has the query tokens `cu_seqlens[r]` to `cu_seqlens[r + 1]` (at most `max_query_len`), which are the last
    ones of its `seq_lens[r]` tokens in the cache. Causal: a query sees every token up to itself, at most
    `sliding_window` of them. Caches [num_blocks, block_size, Hkv, D], Hq a multiple of Hkv; `block_tables`
    [R, max_blocks], padded with any valid block, `cu_seqlens` [R + 1] and `seq_lens` [R] are int32. `sliding_window`
    0: none; `softcap` 0: none, else scores become `softcap * tanh(score / softcap)`.
    """
    PAGED_PREFILL_ATTENTION(
        query, k_cache, v_cache, block_tables, cu_seqlens, seq_lens, max_query_len, scale, sliding_window, softcap, out
    )


def _cpu(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens: Tensor,
    seq_lens: Tensor,
    max_query_len: int,
    scale: float,
    sliding_window: int,
    softcap: float,
    out: Tensor,
) -> None:
    starts = cu_seqlens.tolist()
    for row, length in enumerate(seq_lens.tolist()):
        begin, end = starts[row], starts[row + 1]
        keys, values = (gather_rows(cache, block_tables[row], length) for cache in (k_cache, v_cache))
        chunk = query[begin:end].transpose(0, 1)[None]
        if end - begin == length and not (sliding_window or softcap):
            attended = F.scaled_dot_product_attention(chunk, keys, values, is_causal=True, scale=scale, enable_gqa=True)
        else:
            mask = _causal_mask(end - begin, length, sliding_window)
            attended = attend(chunk, keys, values, mask, scale, softcap)
        out[begin:end] = attended[0].transpose(0, 1)


def _causal_mask(num_queries: int, length: int, sliding_window: int) -> Tensor:
    """Bool [num_queries, length]; the queries are the last tokens."""
    places = torch.arange(length)
    ends = torch.arange(length - num_queries, length)[:, None]
    mask = places <= ends
    return mask & (places > ends - sliding_window) if sliding_window else mask


def _fake(*_: object) -> None:
    return None


PAGED_PREFILL_ATTENTION: Final = define_op(
    "paged_prefill_attention(Tensor query, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor cu_seqlens, "
    "Tensor seq_lens, int max_query_len, float scale, int sliding_window, float softcap, Tensor(a!) out) -> ()",
    cpu=_cpu,
    fake=_fake,
)
