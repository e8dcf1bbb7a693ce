"""Attention of a ragged batch of query chunks over the paged KV cache.

One call serves prefill chunks and decodes mixed: request r has `cu_seqlens[r+1] - cu_seqlens[r]` query
tokens, which are the last ones of its `seq_lens[r]` tokens in the cache. Causal: a query sees every token
up to itself, at most `sliding_window` of them.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from executor_service.kernels.library import define_op


def paged_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens: Tensor,
    seq_lens: Tensor,
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """`query` [T, Hq, D] -> [T, Hq, D].

    Caches [num_blocks, block_size, Hkv, D], Hq a multiple of Hkv; `block_tables` [R, max_blocks] int64,
    padded with any valid block; `cu_seqlens` [R + 1] and `seq_lens` [R] int64. `sliding_window` 0: none;
    `softcap` 0: none, else scores become `softcap * tanh(score / softcap)`.
    """
    result: Tensor = PAGED_ATTENTION(
        query, k_cache, v_cache, block_tables, cu_seqlens, seq_lens, scale, sliding_window, softcap
    )
    return result


def _cpu(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens: Tensor,
    seq_lens: Tensor,
    scale: float,
    sliding_window: int,
    softcap: float,
) -> Tensor:
    """Runs of single-token queries go together, padded to the longest; longer chunks one by one."""
    out = torch.empty_like(query)
    starts, lengths = cu_seqlens.tolist(), seq_lens.tolist()
    num_decodes = _leading_decodes(starts)
    if num_decodes:
        out[:num_decodes] = _decode(
            query[:num_decodes], k_cache, v_cache, block_tables[:num_decodes], seq_lens[:num_decodes],
            scale, sliding_window, softcap,
        )  # fmt: skip
    for row in range(num_decodes, len(lengths)):
        begin, end, length = starts[row], starts[row + 1], lengths[row]
        keys, values = (_gather(cache, block_tables[row], length) for cache in (k_cache, v_cache))
        chunk = query[begin:end].transpose(0, 1)[None]
        if end - begin == length and not (sliding_window or softcap):
            attended = F.scaled_dot_product_attention(chunk, keys, values, is_causal=True, scale=scale, enable_gqa=True)
        else:
            mask = _causal_mask(end - begin, length, sliding_window)
            attended = _attend(chunk, keys, values, mask, scale, softcap)
        out[begin:end] = attended[0].transpose(0, 1)
    return out


def _leading_decodes(starts: list[int]) -> int:
    count = 0
    while count + 1 < len(starts) and starts[count + 1] == count + 1:
        count += 1
    return count


def _decode(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    sliding_window: int,
    softcap: float,
) -> Tensor:
    """[B, Hq, D] -> [B, Hq, D]; the heads that share a KV head are its query rows, so no key is repeated."""
    batch, num_heads, head_dim = query.shape
    num_kv_heads = k_cache.shape[2]
    longest = int(seq_lens.max())
    keys, values = (_gather(cache, block_tables, longest) for cache in (k_cache, v_cache))
    mask = None
    if sliding_window or bool((seq_lens != longest).any()):
        places = torch.arange(longest)
        seen = places < seq_lens[:, None]
        if sliding_window:
            seen &= places >= seq_lens[:, None] - sliding_window
        mask = seen[:, None, None, :]
    grouped = query.view(batch, num_kv_heads, num_heads // num_kv_heads, head_dim)
    return _attend(grouped, keys, values, mask, scale, softcap).reshape(query.shape)


def _gather(cache: Tensor, block_tables: Tensor, length: int) -> Tensor:
    """The first `length` cached rows of requests [..., max_blocks]: [B, Hkv, length, D]; B is 1 for a single table."""
    _, block_size, num_kv_heads, head_dim = cache.shape
    tables = block_tables[..., : -(-length // block_size)]
    # index_select copies whole blocks; advanced indexing walks their elements, at a sixth of the speed.
    rows = cache.index_select(0, tables.reshape(-1)).view(-1, tables.shape[-1] * block_size, num_kv_heads, head_dim)
    return rows[:, :length].transpose(1, 2)


def _causal_mask(num_queries: int, length: int, sliding_window: int) -> Tensor:
    """Bool [num_queries, length]; the queries are the last tokens."""
    places = torch.arange(length)
    ends = torch.arange(length - num_queries, length)[:, None]
    mask = places <= ends
    return mask & (places > ends - sliding_window) if sliding_window else mask


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    """[B, Hq, Q, D] x [B, Hkv, K, D] -> [B, Hq, Q, D]; `mask` None: everything is seen."""
    keys, values = keys.to(query.dtype), values.to(query.dtype)
    if not softcap:
        gqa = query.shape[1] != keys.shape[1]
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale, enable_gqa=gqa)
    repeats = query.shape[1] // keys.shape[1]
    keys, values = (tensor.repeat_interleave(repeats, dim=1) for tensor in (keys, values))
    scores = softcap * torch.tanh(query @ keys.transpose(-1, -2) * (scale / softcap))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ values


def _fake(query: Tensor, *_: object) -> Tensor:
    return torch.empty_like(query)


PAGED_ATTENTION: Final = define_op(
    "paged_attention(Tensor query, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor cu_seqlens, "
    "Tensor seq_lens, float scale, int sliding_window, float softcap) -> Tensor",
    cpu=_cpu,
    fake=_fake,
)
