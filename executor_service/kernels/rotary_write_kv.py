"""Rotary position embedding (Su et al., 2021) of queries and keys, and the keys' and values' way into the KV cache."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from executor_service.kernels.cuda.module import INT, POINTER, dtype_name, is_wide, kernel
from executor_service.kernels.library import define_op

_THREADS: Final = 256


def rotary_write_kv(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> Tensor:
    """`qkv` [T, (Hq + 2 * Hkv) * D]: queries, keys and values of T tokens -> rotated queries [T, Hq, D].

    `cos` and `sin` [T, D] in the dtype of `qkv`, both halves alike: element i of a head turns with element
    i + D / 2. Rotated keys and plain values go to the caches [num_blocks, block_size, Hkv, D] at `slot_mapping`
    [T] (int64): slot s is token s % block_size of block s // block_size. Slots are unique within a call.
    """
    result: Tensor = ROTARY_WRITE_KV(qkv, cos, sin, k_cache, v_cache, slot_mapping)
    return result


def _cpu(qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> Tensor:
    num_kv_heads, head_dim = k_cache.shape[2:]
    heads = qkv.unflatten(-1, (qkv.shape[1] // head_dim, head_dim))
    num_heads = heads.shape[1] - 2 * num_kv_heads
    turning = heads[:, : num_heads + num_kv_heads]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
    for rows, cache in ((turned[:, num_heads:], k_cache), (heads[:, num_heads + num_kv_heads :], v_cache)):
        cache.view(-1, num_kv_heads, head_dim).index_copy_(0, slot_mapping, rows.to(cache.dtype))
    return turned[:, :num_heads].contiguous()


def _cuda(qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> Tensor:
    num_kv_heads, head_dim = k_cache.shape[2:]
    query = _fake(qkv, cos, sin, k_cache, v_cache, slot_mapping)
    if not qkv.numel():
        return query
    kind = "wide" if is_wide(qkv.dtype, head_dim // 2) else "single"
    launch = kernel("rotary_write_kv", f"rotary_write_kv_{dtype_name(qkv.dtype)}_{kind}", (POINTER,) * 7 + (INT,) * 3)
    launch(
        (qkv.shape[0],), _THREADS, qkv.contiguous(), cos.contiguous(), sin.contiguous(), k_cache, v_cache, slot_mapping,
        query, query.shape[1], num_kv_heads, head_dim,
    )  # fmt: skip
    return query


def _fake(qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> Tensor:
    num_kv_heads, head_dim = k_cache.shape[2:]
    return qkv.new_empty((qkv.shape[0], qkv.shape[1] // head_dim - 2 * num_kv_heads, head_dim))


ROTARY_WRITE_KV: Final = define_op(
    "rotary_write_kv(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor slot_mapping) -> Tensor",
    cpu=_cpu,
    fake=_fake,
    cuda=_cuda,
)
