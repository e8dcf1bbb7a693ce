"""Store keys and values of a batch of tokens to their slots in the paged KV cache."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from executor_service.kernels.cuda.module import INT, POINTER, kernel
from executor_service.kernels.library import define_op

_MAX_THREADS: Final = 256


def write_kv(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """`key`, `value` [T, Hkv, D] -> caches [num_blocks, block_size, Hkv, D] at `slot_mapping` [T] (int64).

    Slot s is token s % block_size of block s // block_size; a token with slot -1 is not stored. Slots are unique
    within a call.
    """
    WRITE_KV(key, value, k_cache, v_cache, slot_mapping)


def store_rows(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """The reference, of this op and of others that store."""
    if slot_mapping.numel() and int(slot_mapping.min()) < 0:
        is_stored = slot_mapping >= 0
        key, value, slot_mapping = key[is_stored], value[is_stored], slot_mapping[is_stored]
    for rows, cache in ((key, k_cache), (value, v_cache)):
        cache.flatten(0, 1).index_copy_(0, slot_mapping, rows.to(cache.dtype))


def _cuda(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    if not key.numel():
        return
    key, value = (rows.to(k_cache.dtype).contiguous() for rows in (key, value))
    row_bytes = key[0].numel() * key.itemsize
    access = next(size for size in (16, 4, 2) if not row_bytes % size)
    length = row_bytes // access
    launch = kernel("write_kv", f"write_kv_{access}", (POINTER,) * 5 + (INT,), is_dependent=True)
    launch((len(key),), min(length, _MAX_THREADS), key, value, k_cache, v_cache, slot_mapping, length)


def _fake(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    torch._check(key.shape == value.shape)


WRITE_KV: Final = define_op(
    "write_kv(Tensor key, Tensor value, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping) -> ()",
    cpu=store_rows,
    fake=_fake,
    cuda=_cuda,
)
