"""Attention over the paged KV cache: two thin callers of one function.

`Attention` is for models written against this package; `paged_attention_interface` is what transformers
calls once it is registered as an attention implementation.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from executor_service.kernels.paged_decode_attention import PAGED_DECODE_ATTENTION
from executor_service.kernels.paged_prefill_attention import PAGED_PREFILL_ATTENTION
from executor_service.kernels.write_kv import write_kv
from executor_service.layers.context import AttentionMetadata, KVCache, current_context

IMPLEMENTATION: Final = "diptych_paged"
"""Name of the implementation in transformers' registry."""


class Attention(nn.Module):
    """Attention of one layer; keys and values go to the layer's cache first.

    Causal, but for bidirectional spans, which are the batch's to know.
    `sliding_window` and `softcap` of 0 mean none.
    """

    def __init__(
        self,
        layer_index: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float | None = None,
        sliding_window: int = 0,
        softcap: float = 0.0,
    ) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        self.sliding_window = sliding_window
        self.softcap = softcap

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`query` [T, num_heads, head_dim], `key` and `value` [T, num_kv_heads, head_dim] -> like `query`."""
        return _attend(self.layer_index, query, key, value, self.scale, self.sliding_window, self.softcap)


def paged_attention_interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Transformers' form: `query` [1, Hq, T, D], `key`/`value` [1, Hkv, T, D] -> ([1, T, Hq, D], None).

    `attention_mask` is None: no mask function is registered under our name, the batch's metadata says who
    sees what.
    """
    flat_query, flat_key, flat_value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer_index = int(module.layer_idx)  # type: ignore[arg-type]
    out = _attend(layer_index, flat_query, flat_key, flat_value, scale, sliding_window or 0, softcap or 0.0)
    return out[None], None


def _attend(
    layer_index: int, query: Tensor, key: Tensor, value: Tensor, scale: float, sliding_window: int, softcap: float
) -> Tensor:
    context = current_context()
    batch, cache = context.metadata, context.kv_caches[layer_index]
    write_kv(key, value, cache.keys, cache.values, batch.slot_mapping)
    return paged_attention(query.contiguous(), cache, batch, scale, sliding_window, softcap)


def paged_attention(
    query: Tensor, cache: KVCache, batch: AttentionMetadata, scale: float, sliding_window: int, softcap: float
) -> Tensor:
    """`query` [T, Hq, D], contiguous, of the batch's tokens, whose keys and values are in the cache -> [T, Hq, D]."""
    out = torch.empty_like(query)
    device, count, num_requests = query.device.type, batch.num_decodes, batch.seq_lens.shape[0]
    caches = (cache.keys, cache.values)
    if count:
        decodes = (query, batch.block_tables, batch.seq_lens, out)
        if count < num_requests:
            decodes = (query[:count], batch.block_tables[:count], batch.seq_lens[:count], out[:count])
        queries, tables, lengths, results = decodes
        PAGED_DECODE_ATTENTION.direct(device)(
            queries, *caches, tables, lengths, scale, sliding_window, softcap, results
        )  # fmt: skip
    if count < num_requests:
        PAGED_PREFILL_ATTENTION.direct(device)(
            query, *caches, batch.block_tables[count:], batch.cu_seqlens[count:], batch.seq_lens[count:],
            batch.max_query_len, scale, sliding_window, softcap, out, batch.visible_ends,
        )  # fmt: skip
    return out


AttentionInterface.register(IMPLEMENTATION, paged_attention_interface)
