"""What the CPU references of both paged attention ops share: rows gathered by block table, and plain attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor


def gather_rows(cache: Tensor, block_table: Tensor, length: int, first: int = 0) -> Tensor:
    """Cached rows `first` to `length` of the request with the blocks `block_table` [max_blocks]: [Hkv, rows, D]."""
    begin = first // cache.shape[1]
    blocks = block_table[begin : -(-length // cache.shape[1])]
    # index_select copies whole blocks; advanced indexing walks their elements, at a sixth of the speed. Products on
    # views of blocks that happen to be neighbours take longer than on the copy, which is in the core's own cache.
    rows = cache.index_select(0, blocks).flatten(0, 1)
    skipped = begin * cache.shape[1]
    return rows[first - skipped : length - skipped].transpose(0, 1)


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
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
