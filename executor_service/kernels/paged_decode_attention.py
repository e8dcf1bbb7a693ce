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
_MAX_LEAVES: Final = 16
_ROUNDS: Final = 5
_GENERAL_THREADS: Final = 256
_POINTERS: Final = (POINTER,) * 6
_STREAM_TYPES: Final = (*_POINTERS, POINTER, INT, INT, INT, INT, INT, FLOAT, FLOAT, INT, INT, INT, INT)
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
    batch, num_heads, head_dim = query.shape
    num_kv_heads = k_cache.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    grouped = (query.to(dtype) * scale).view(batch, num_kv_heads, num_heads // num_kv_heads, head_dim)
    for row, length in enumerate(seq_lens.tolist()):
        if not length:
            out[row] = 0.0
            continue
        first = max(length - sliding_window, 0) if sliding_window else 0
        keys, values = (gather_rows(cache, block_tables[row], length)[0, :, first:] for cache in (k_cache, v_cache))
        scores = torch.bmm(grouped[row], keys.to(dtype).transpose(1, 2))
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        out[row] = torch.bmm(scores.softmax(-1), values.to(dtype)).view(num_heads, head_dim)


@dataclass(frozen=True)
class Variant:
    """How the streaming kernel is built and launched: warps of a block, tiles that its copies run ahead, blocks."""

    num_warps: int
    num_stages: int
    blocks_each: int
    """Blocks per multiprocessor."""
    max_lanes: int = 4
    """Neighbouring heads that are read at the same time, at most."""

    def shared_bytes(self, head_dim: int) -> int:
        """As the kernel lays it out: keys and values, queries, two tiles of scores."""
        tile, row = 16 * self.num_warps, 2 * head_dim
        return self.num_stages * (2 * tile + _HEADS_PER_PASS) * row + 2 * _HEADS_PER_PASS * (tile + 8) * 4


@dataclass(frozen=True)
class _Launch:
    kernel: Kernel
    grid: tuple[int]
    num_threads: int
    split: tuple[int, int, int]
    """Multiprocessors, lanes, and 2^32 / blocks of a lane: see the kernel's plan."""
    num_partials: int
    """Floats that the kernel needs for partial results."""


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
        partials = torch.empty(stream.num_partials, dtype=torch.float32, device=query.device)
        stream.kernel(
            stream.grid, stream.num_threads, *pointers, partials, batch, num_heads, num_kv_heads,
            block_size.bit_length() - 1, block_tables.stride(0), *factors, sliding_window, *stream.split,
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
) -> _Launch:
    variant = variant or _variant(head_dim, device)
    processors = num_multiprocessors(device)
    name = f"paged_decode_attention_{dtype_name(dtype)}_{head_dim}_{variant.num_warps}_{variant.num_stages}"
    launch = kernel("paged_decode_attention", name, _STREAM_TYPES, variant.shared_bytes(head_dim), is_dependent=True)
    blocks, group = processors * variant.blocks_each, num_heads // num_kv_heads
    passes = num_kv_heads * -(-group // _HEADS_PER_PASS)
    lanes = math.gcd(math.gcd(passes, processors), variant.max_lanes)
    step = -(-(1 << 32) * lanes // blocks)
    partials = _ROUNDS * blocks * (_MAX_LEAVES + 1) * min(_HEADS_PER_PASS, group) * (head_dim + 4)
    return _Launch(launch, (blocks,), 32 * variant.num_warps, (processors, lanes, _signed(step)), partials)


def _signed(value: int) -> int:
    """The same 32 bits."""
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)


def _variant(head_dim: int, device: int) -> Variant:
    """What was fastest where it fits: shared memory of a multiprocessor, 4 KiB of it for what else a block needs."""
    available = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    for stages in (3, 2):
        bytes_each = Variant(4, stages, 1).shared_bytes(head_dim) + 4096
        if 2 * bytes_each <= available:
            return Variant(4, stages, min(3, available // bytes_each))
    return Variant(4, 2, 1)


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
