"""Attention of one query token per request over the paged KV cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Final

import torch
from torch import Tensor

from executor_service.kernels.cuda.module import FLOAT, INT, POINTER, Kernel, dtype_name, kernel, num_multiprocessors
from executor_service.kernels.library import define_op
from executor_service.kernels.paged_rows import gather_rows

_STREAMED_DTYPES: Final = (torch.float16, torch.bfloat16)
_STREAMED_DIMS: Final = (64, 128)
_MAX_DIM: Final = 256
_HEADS_PER_PASS: Final = 8
_MAX_ITEMS: Final = 1 << 16
_GENERAL_THREADS: Final = 256
_POINTERS: Final = (POINTER,) * 6
_STREAM_TYPES: Final = (*_POINTERS, POINTER, *(INT,) * 6, FLOAT, FLOAT, INT)
_GENERAL_TYPES: Final = (*_POINTERS, INT, INT, INT, INT, INT, FLOAT, FLOAT, INT)


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

    On a GPU, all but `query`, `out` and the rows of each request's last token is read before the kernel launched before
    has ended: what writes `block_tables`, `seq_lens` and the other rows lies further back on the stream, with a copy or
    a kernel that does not begin early (`is_dependent`) behind it.
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
    """Request by request: then what is gathered for one is still in the core's own cache when it is multiplied.

    So a request depends on nobody else in the batch. Scores are float32 at least.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    shape = (query.shape[0], k_cache.shape[2], -1, query.shape[2])
    requests = ((query.to(dtype) * scale).view(shape).unbind(), block_tables.unbind(), out.view(shape).unbind())
    for length, queries, table, result in zip(seq_lens.tolist(), *requests, strict=True):
        if not length:
            result.zero_()
            continue
        first = max(length - sliding_window, 0) if sliding_window else 0
        keys = gather_rows(k_cache, table, length, first).to(dtype)
        scores = torch.bmm(queries, keys.transpose(1, 2))
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        values = gather_rows(v_cache, table, length, first).to(dtype)
        result.copy_(torch.bmm(scores.softmax(-1), values))


@dataclass(frozen=True)
class Variant:
    """How the streaming kernel is built and launched; see csrc/paged_decode_attention_stream.cuh."""

    num_warps: int
    """That compute, each 16 tokens of a tile."""
    num_stages: int
    """Tiles that copies run ahead."""
    blocks_each: int
    """Blocks per multiprocessor."""

    def shared_bytes(self, head_dim: int) -> int:
        """The ring of keys and values."""
        return self.num_stages * self.num_warps * 2 * 16 * 2 * head_dim

    def max_chunks(self, num_tokens: int) -> int:
        """Of a request of at most so many tokens, as csrc/paged_decode_attention_units.cuh cuts it."""
        tiles = -(-num_tokens // (16 * self.num_warps))
        even = max(2 * tiles // 5, 1).bit_length() - 1
        needed = ((tiles - 1) // 32).bit_length()
        return 1 << max(min(even, 4), needed)


@dataclass(frozen=True)
class _Stream:
    kernel: Kernel
    variant: Variant
    num_passes: int
    num_blocks: int
    partial_size: int
    """Floats of a unit's partial result."""


def launch(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    sliding_window: int,
    softcap: float,
    out: Tensor,
    variant: Variant | None = None,
) -> None:
    """The op on a GPU; a `variant` other than what this GPU gets by itself is for benchmarks.

    Exponentials are powers of two in the kernels, so scores are scaled by log2(e) too.
    """
    batch, num_heads, head_dim = query.shape
    _, block_size, num_kv_heads, _ = k_cache.shape
    if not batch:
        return
    log2e = math.log2(math.e)
    factors = (scale / softcap, softcap * log2e) if softcap else (scale * log2e, 0.0)
    pointers = (query.contiguous(), k_cache, v_cache, block_tables, seq_lens, out)
    if _is_streamed(query.dtype, batch, num_heads, num_kv_heads, head_dim, block_size):
        stream = _streaming(query.dtype, num_heads, num_kv_heads, head_dim, query.device.index, variant)
        built = stream.variant
        num_units = batch * stream.num_passes * built.max_chunks(block_tables.shape[1] * block_size)
        partials = torch.empty(num_units * stream.partial_size, dtype=torch.float32, device=query.device)
        stream.kernel(
            (min(stream.num_blocks, num_units),), 32 * (built.num_warps + 1), *pointers, partials, batch, num_kv_heads,
            num_heads // num_kv_heads, stream.num_passes, block_size.bit_length() - 1, block_tables.stride(0), *factors,
            sliding_window,
        )  # fmt: skip
    else:
        _general(query.dtype, head_dim)(
            (batch, num_heads), _GENERAL_THREADS, *pointers, num_heads, num_kv_heads, head_dim, block_size,
            block_tables.stride(0), *factors, sliding_window,
        )  # fmt: skip


@cache
def _is_streamed(
    dtype: torch.dtype, batch: int, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int
) -> bool:
    """Whether the streaming kernel takes it; the general one takes the rest."""
    items = batch * num_kv_heads * -(-num_heads // num_kv_heads // _HEADS_PER_PASS)
    is_power = block_size >= 16 and not block_size & (block_size - 1)
    return dtype in _STREAMED_DTYPES and head_dim in _STREAMED_DIMS and is_power and items <= _MAX_ITEMS


@cache
def _streaming(
    dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int, device: int, variant: Variant | None = None
) -> _Stream:
    variant = variant or _variant(head_dim, device)
    name = f"paged_decode_attention_{dtype_name(dtype)}_{head_dim}_{variant.num_warps}_{variant.num_stages}"
    launch = kernel("paged_decode_attention", name, _STREAM_TYPES, variant.shared_bytes(head_dim), is_dependent=True)
    group = num_heads // num_kv_heads
    passes = num_kv_heads * -(-group // _HEADS_PER_PASS)
    blocks = num_multiprocessors(device) * variant.blocks_each
    return _Stream(launch, variant, passes, blocks, min(_HEADS_PER_PASS, group) * (head_dim + 4))


def _variant(head_dim: int, device: int) -> Variant:
    """What was fastest where it fits: shared memory of a multiprocessor, 4 KiB of it for what else a block needs."""
    available = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    return Variant(4, 2, 2 if 2 * (Variant(4, 2, 1).shared_bytes(head_dim) + 4096) <= available else 1)


@cache
def _general(dtype: torch.dtype, head_dim: int) -> Kernel:
    if head_dim > _MAX_DIM:
        raise ValueError(f"paged_decode_attention takes heads of at most {_MAX_DIM}, not of {head_dim}")
    name = f"paged_decode_attention_{dtype_name(dtype)}"
    return kernel("paged_decode_attention", name, _GENERAL_TYPES, is_dependent=True)


def _fake(*_: object) -> None:
    return None


PAGED_DECODE_ATTENTION: Final = define_op(
    "paged_decode_attention(Tensor query, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor seq_lens, "
    "float scale, int sliding_window, float softcap, Tensor(a!) out) -> ()",
    cpu=_cpu,
    fake=_fake,
    cuda=launch,
)
