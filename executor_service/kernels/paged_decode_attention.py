"""Attention of one query token per request over the paged KV cache."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from executor_service.kernels.library import define_op
from executor_service.kernels.paged_rows import attend, gather_rows


def paged_decode_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    sliding_window: int,
    softcap: float,
    out: Tensor,
) -> None:
    """`query` [B, Hq, D] -> `out` [B, Hq, D], contiguous.

    Caches [num_blocks, block_size, Hkv, D], Hq a multiple of Hkv; `block_tables` [B, max_blocks] int32, padded with any
    valid block; the query of request b is the last of its `seq_lens[b]` (int32) tokens in the cache and sees all of
    them, or the last `sliding_window` (0: none). `softcap` 0: none, else scores become `softcap * tanh(score /
    softcap)`. A request of length 0 gets zeros.
    """
    PAGED_DECODE_ATTENTION(query, k_cache, v_cache, block_tables, seq_lens, scale, sliding_window, softcap, out)


def _cpu(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    sliding_window: int,
    softcap: float,
    out: Tensor,
) -> None:
    """All requests together, padded to the longest; the heads that share a KV head are its query rows."""
    batch, num_heads, head_dim = query.shape
    num_kv_heads = k_cache.shape[2]
    longest = int(seq_lens.max())
    keys, values = (gather_rows(cache, block_tables, longest) for cache in (k_cache, v_cache))
    mask = None
    if sliding_window or bool((seq_lens != longest).any()):
        places = torch.arange(longest)
        seen = places < seq_lens[:, None]
        if sliding_window:
            seen &= places >= seq_lens[:, None] - sliding_window
        mask = seen[:, None, None, :]
    grouped = query.view(batch, num_kv_heads, num_heads // num_kv_heads, head_dim)
    attended = attend(grouped, keys, values, mask, scale, softcap).reshape(query.shape)
    out.copy_(attended.masked_fill_((seq_lens == 0)[:, None, None], 0.0))


def _fake(*_: object) -> None:
    return None


PAGED_DECODE_ATTENTION: Final = define_op(
    "paged_decode_attention(Tensor query, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor seq_lens, "
    "float scale, int sliding_window, float softcap, Tensor(a!) out) -> ()",
    cpu=_cpu,
    fake=_fake,
)
