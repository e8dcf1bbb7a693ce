"""Rotary position embedding (Su et al., 2021) of queries and keys, and the keys' and values' way into the KV cache."""

from __future__ import annotations

from functools import cache
from typing import Final

import torch
from torch import Tensor

from executor_service.kernels.cuda.module import (
    INT,
    POINTER,
    Kernel,
    dtype_name,
    is_wide,
    kernel,
    num_multiprocessors,
)
from executor_service.kernels.library import define_op
from executor_service.kernels.write_kv import store_rows

_THREADS: Final = 512
_HEADS_OF_MANY_TOKENS: Final = 2
"""Heads whose loads a thread has under way, where there are tokens for every multiprocessor."""


def rotary_write_kv(
    qkv: Tensor, positions: Tensor, cos_sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> Tensor:
    """`qkv` [T, (Hq + 2 * Hkv) * D]: queries, keys and values of T tokens -> rotated queries [T, Hq, D]; Hq may be 0.

    Row p of `cos_sin` [max_positions, D], in the dtype of `qkv`, has the cosines [D / 2] and then the sines of
    position p; `positions` [T] (int64) lie within it. Element i of a head turns with element i + D / 2. Rotated
    keys and plain values go to the caches [num_blocks, block_size, Hkv, D] at `slot_mapping` [T] (int64): slot s is
    token s % block_size of block s // block_size, and a token with slot -1 is not stored. Slots are unique within
    a call.
    """
    result: Tensor = ROTARY_WRITE_KV(qkv, positions, cos_sin, k_cache, v_cache, slot_mapping)
    return result


def _cpu(
    qkv: Tensor, positions: Tensor, cos_sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> Tensor:
    num_kv_heads, head_dim = k_cache.shape[2:]
    heads = qkv.view(qkv.shape[0], qkv.shape[1] // head_dim, 2, head_dim // 2)
    turning, values = heads[:, :-num_kv_heads], heads[:, -num_kv_heads:]
    first, second = turning.unbind(2)
    cos, sin = cos_sin.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=2).flatten(2)
    store_rows(turned[:, -num_kv_heads:], values.flatten(2), k_cache, v_cache, slot_mapping)
    return turned[:, :-num_kv_heads].contiguous()


def _cuda(
    qkv: Tensor, positions: Tensor, cos_sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> Tensor:
    num_kv_heads, head_dim = k_cache.shape[2:]
    query = _fake(qkv, positions, cos_sin, k_cache, v_cache, slot_mapping)
    tokens, num_heads = query.shape[:2]
    if tokens:
        is_many = tokens >= 2 * num_multiprocessors(qkv.device.index)
        launch, pieces, threads = _variant(qkv.dtype, num_heads + 2 * num_kv_heads, head_dim, is_many)
        launch(
            (tokens, pieces), threads, qkv.contiguous(), positions, cos_sin, k_cache, v_cache, slot_mapping, query,
            num_heads, num_kv_heads, head_dim,
        )  # fmt: skip
    return query


@cache
def _variant(dtype: torch.dtype, all_heads: int, head_dim: int, is_many: bool) -> tuple[Kernel, int, int]:
    """The kernel, into how many blocks it cuts a token, and the threads of a block: whole halves of heads."""
    kind = "wide" if is_wide(dtype, head_dim // 2) else "single"
    packs = head_dim // 2 * dtype.itemsize // 16 if kind == "wide" else head_dim // 2
    if packs > _THREADS:
        raise ValueError(f"rotary_write_kv takes heads of at most {2 * _THREADS} accesses, not of {2 * packs}")
    heads_each = _HEADS_OF_MANY_TOKENS if is_many else 1
    pieces = -(-all_heads * packs // (heads_each * _THREADS))
    heads_apart = min(-(-all_heads // (pieces * heads_each)), _THREADS // packs)
    pieces = -(-all_heads // (heads_each * heads_apart))
    name = f"rotary_write_kv_{dtype_name(dtype)}_{kind}_{heads_each}"
    launch = kernel("rotary_write_kv", name, (POINTER,) * 7 + (INT,) * 3, is_dependent=True)
    return launch, pieces, heads_apart * packs


def _fake(
    qkv: Tensor, positions: Tensor, cos_sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> Tensor:
    num_kv_heads, head_dim = k_cache.shape[2:]
    return qkv.new_empty((qkv.shape[0], qkv.shape[1] // head_dim - 2 * num_kv_heads, head_dim))


ROTARY_WRITE_KV: Final = define_op(
    "rotary_write_kv(Tensor qkv, Tensor positions, Tensor cos_sin, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor slot_mapping) -> Tensor",
    cpu=_cpu,
    fake=_fake,
    cuda=_cuda,
)
