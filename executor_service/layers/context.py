"""What attention needs to know about the batch, set by the model runner around each forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KVCache:
    """Keys and values of one layer: each [num_blocks, block_size, num_kv_heads, head_dim]."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class AttentionMetadata:
    """One flattened batch of R requests and T tokens; the first `num_decodes` requests have a single token each.

    `slot_mapping` [T] is int64; `cu_seqlens` [R + 1], `seq_lens` [R] (tokens in the cache after this pass) and
    `block_tables` [R, max_blocks] are int32. No chunk has more than `max_query_len` tokens. The two numbers are the
    host's, so that nobody waits for the device to know them. `visible_ends` [T], int32, is there where a chunk has
    tokens that see later ones; see `paged_prefill_attention`.
    """

    slot_mapping: Tensor
    cu_seqlens: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    num_decodes: int
    max_query_len: int
    visible_ends: Tensor | None = None

    def last_rows(self, requests: Tensor) -> Tensor:
        """Where the last tokens of `requests` [S] are: int64 [S]."""
        return self.cu_seqlens[1:][requests].long() - 1

    def of_last_tokens(self, requests: Tensor) -> AttentionMetadata:
        """The batch that is left of `requests` [S] when all but their last tokens have been computed before."""
        count = len(requests)
        starts = torch.arange(count + 1, dtype=torch.int32, device=requests.device)
        slots, lengths = self.slot_mapping[self.last_rows(requests)], self.seq_lens[requests]
        return AttentionMetadata(
            slots, starts, lengths, self.block_tables[requests], num_decodes=count, max_query_len=1
        )


@dataclass(frozen=True)
class ForwardContext:
    """Metadata and the caches of all layers."""

    metadata: AttentionMetadata
    kv_caches: Sequence[KVCache]


_CURRENT: list[ForwardContext] = []


@contextlib.contextmanager
def forward_context(metadata: AttentionMetadata, kv_caches: Sequence[KVCache]) -> Iterator[None]:
    """Make the batch known to every attention layer inside the block."""
    _CURRENT.append(ForwardContext(metadata, kv_caches))
    try:
        yield
    finally:
        _CURRENT.pop()


def current_context() -> ForwardContext:
    """The innermost context; RuntimeError outside of one."""
    if not _CURRENT:
        raise RuntimeError("attention over the paged KV cache ran outside of forward_context")
    return _CURRENT[-1]
