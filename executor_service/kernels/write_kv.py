"""Store keys and values of a batch of tokens to their slots in the paged KV cache."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from executor_service.kernels.library import define_op


def write_kv(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """`key`, `value` [T, Hkv, D] -> caches [num_blocks, block_size, Hkv, D] at `slot_mapping` [T] (int64).

    Slot s is token s % block_size of block s // block_size. Slots are unique within a call.
    """
    WRITE_KV(key, value, k_cache, v_cache, slot_mapping)


def _cpu(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    for source, cache in ((key, k_cache), (value, v_cache)):
        cache.view(-1, *cache.shape[2:]).index_copy_(0, slot_mapping, source.to(cache.dtype))


def _fake(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    torch._check(key.shape == value.shape)


WRITE_KV: Final = define_op(
    "write_kv(Tensor key, Tensor value, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping) -> ()",
    cpu=_cpu,
    fake=_fake,
)
