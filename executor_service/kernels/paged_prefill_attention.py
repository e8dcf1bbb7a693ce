"""Attention of a ragged batch of query chunks over the paged KV cache, causal or with bidirectional spans."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from executor_service.kernels.cuda.module import (
    BY_VALUE,
    FLOAT,
    INT,
    LONG,
    POINTER,
    dtype_name,
    kernel,
    num_multiprocessors,
)
from executor_service.kernels.cuda.tensor_map import tensor_map
from executor_service.kernels.library import define_op
from executor_service.kernels.paged_rows import attend, gather_rows

_SOURCE: Final = "paged_prefill_attention"
_ROWS: Final = 128
"""Queries that one block of the tensor core kernels has at a time."""
_KEYS: Final = 128
_GENERAL_WARPS: Final = 4
_MMA_KEYS: Final = 64
_WGMMA_THREADS: Final = 384
_TENSOR_CORE_HEADS: Final = (64, 128)
_NUM_COUNTERS: Final = 256
_KEPT: Final[list[Tensor]] = []


def paged_prefill_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens: Tensor,
    seq_lens: Tensor,
    max_query_len: int,
    scale: float,
    sliding_window: int,
    softcap: float,
    out: Tensor,
    visible_ends: Tensor | None = None,
) -> None:
    """`query` [T, Hq, D] -> `out` [T, Hq, D], contiguous; rows outside of all chunks are left as they are.

    Request r has the query tokens `cu_seqlens[r]` to `cu_seqlens[r + 1]` (at most `max_query_len`), which are the last
    ones of its `seq_lens[r]` tokens in the cache. Causal: a query sees every token up to itself, at most
    `sliding_window` of them. Caches [num_blocks, block_size, Hkv, D], Hq a multiple of Hkv; `block_tables`
    [R, max_blocks], padded with any valid block, `cu_seqlens` [R + 1] and `seq_lens` [R] are int32. `sliding_window`
    0: none; `softcap` 0: none, else scores become `softcap * tanh(score / softcap)`.

    `visible_ends` [T], int32, lets queries of bidirectional spans see further, to the end of their span: it says of
    each query how many of its request's tokens are not too late for it to see. That includes itself, is at most
    `seq_lens[r]`, and does not fall from one query of a chunk to the next.
    """
    PAGED_PREFILL_ATTENTION(
        query, k_cache, v_cache, block_tables, cu_seqlens, seq_lens, max_query_len, scale, sliding_window, softcap,
        out, visible_ends,
    )  # fmt: skip


def _cpu(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens: Tensor,
    seq_lens: Tensor,
    max_query_len: int,
    scale: float,
    sliding_window: int,
    softcap: float,
    out: Tensor,
    visible_ends: Tensor | None = None,
) -> None:
    starts = cu_seqlens.tolist()
    for row, length in enumerate(seq_lens.tolist()):
        begin, end = starts[row], starts[row + 1]
        visible = None if visible_ends is None else visible_ends[begin:end]
        keys, values = (gather_rows(cache, block_tables[row], length)[None] for cache in (k_cache, v_cache))
        chunk = query[begin:end].transpose(0, 1)[None]
        if end - begin == length and visible is None and not (sliding_window or softcap):
            attended = F.scaled_dot_product_attention(chunk, keys, values, is_causal=True, scale=scale, enable_gqa=True)
        else:
            mask = _mask(end - begin, length, sliding_window, visible)
            attended = attend(chunk, keys, values, mask, scale, softcap)
        out[begin:end] = attended[0].transpose(0, 1)


def _mask(num_queries: int, length: int, sliding_window: int, visible_ends: Tensor | None) -> Tensor:
    """Bool [num_queries, length]; the queries are the last tokens."""
    places = torch.arange(length)
    own = torch.arange(length - num_queries, length)[:, None]
    mask = places <= own if visible_ends is None else places < visible_ends[:, None]
    return mask & (places > own - sliding_window) if sliding_window else mask


def _cuda(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens: Tensor,
    seq_lens: Tensor,
    max_query_len: int,
    scale: float,
    sliding_window: int,
    softcap: float,
    out: Tensor,
    visible_ends: Tensor | None = None,
) -> None:
    num_requests = len(seq_lens)
    if num_requests and max_query_len:
        _, block_size, _, head_dim = k_cache.shape
        launch = _launcher(query.device.index, query.dtype, head_dim, block_size, visible_ends is not None)
        launch(
            (query, k_cache, v_cache, block_tables, cu_seqlens, seq_lens, out), (num_requests, max_query_len),
            (scale, sliding_window, softcap, 0 if visible_ends is None else visible_ends),
        )  # fmt: skip


_Variant = tuple[float, int, float, Tensor | int]
"""Scale, sliding window, softcap, and `visible_ends` or 0."""
_Launch = Callable[[tuple[Tensor, ...], tuple[int, int], _Variant], None]
"""Takes the tensors, the sizes of the batch, and which attention it is; see `_cuda`."""


@cache
def _launcher(device: int, dtype: torch.dtype, head_dim: int, block_size: int, has_spans: bool) -> _Launch:
    """The kernel for a GPU and what is stored in the cache, ready to be launched."""
    if dtype == torch.float32 or head_dim not in _TENSOR_CORE_HEADS:
        return _general(dtype)
    hopper = torch.cuda.get_device_capability(device) == (9, 0)
    if hopper and block_size >= 8 and block_size & (block_size - 1) == 0:
        return _wgmma(device, dtype, head_dim, has_spans)
    return _mma(dtype, head_dim, has_spans)


def _general(dtype: torch.dtype) -> _Launch:
    types = (*[POINTER] * 7, INT, INT, INT, LONG, FLOAT, INT, FLOAT, POINTER)
    run = kernel(_SOURCE, f"{_SOURCE}_{dtype_name(dtype)}", types, is_dependent=True)

    def launch(tensors: tuple[Tensor, ...], sizes: tuple[int, int], variant: _Variant) -> None:
        query, k_cache, _, block_tables, *_ = tensors
        _, block_size, num_kv_heads, head_dim = k_cache.shape
        grid = (-(-sizes[1] // _GENERAL_WARPS), query.shape[1], sizes[0])
        run(grid, 32 * _GENERAL_WARPS, *tensors, num_kv_heads, head_dim, block_size, block_tables.stride(0), *variant)

    return launch


def _mma(dtype: torch.dtype, head_dim: int, has_spans: bool = False) -> _Launch:
    types = (*[POINTER] * 7, INT, INT, LONG, FLOAT, INT, FLOAT, POINTER)
    shared_bytes = (_ROWS + 4 * _MMA_KEYS) * head_dim * dtype.itemsize
    name = f"{_SOURCE}_mma_{dtype_name(dtype)}_{head_dim}" + "_spans" * has_spans
    run = kernel(f"{_SOURCE}_mma", name, types, shared_bytes, is_dependent=True)

    def launch(tensors: tuple[Tensor, ...], sizes: tuple[int, int], variant: _Variant) -> None:
        query, k_cache, _, block_tables, *_ = tensors
        _, block_size, num_kv_heads, _ = k_cache.shape
        grid = (query.shape[1], -(-sizes[1] // _ROWS), sizes[0])
        run(grid, 2 * _ROWS, *tensors, num_kv_heads, block_size, block_tables.stride(0), *variant)

    return launch


def _wgmma(device: int, dtype: torch.dtype, head_dim: int, has_spans: bool = False) -> _Launch:
    types = (BY_VALUE, BY_VALUE, *[POINTER] * 6, INT, INT, INT, INT, LONG, FLOAT, INT, FLOAT, POINTER)
    shared_bytes = (2 * _ROWS + 4 * _KEYS) * head_dim * dtype.itemsize + 2048
    name = f"{_SOURCE}_wgmma_{dtype_name(dtype)}_{head_dim}" + "_spans" * has_spans
    run = kernel(f"{_SOURCE}_wgmma", name, types, shared_bytes, is_dependent=True)
    num_blocks, counters = num_multiprocessors(device), itertools.cycle(_counters(device))

    def launch(tensors: tuple[Tensor, ...], sizes: tuple[int, int], variant: _Variant) -> None:
        query, k_cache, v_cache, block_tables, cu_seqlens, seq_lens, out = tensors
        shape, num_heads = k_cache.shape, query.shape[1]
        k_map, v_map = _cache_map(k_cache), _cache_map(v_cache)
        grid = (min(num_blocks, sizes[0] * -(-sizes[1] // _ROWS) * num_heads),)
        run(
            grid, _WGMMA_THREADS, k_map, v_map, query, block_tables, cu_seqlens, seq_lens, out, next(counters),
            sizes[0], num_heads, shape[2], shape[1], block_tables.stride(0), *variant,
        )  # fmt: skip

    return launch


@cache
def _counters(device: int) -> list[int]:
    """Addresses of zeros, which a launch counts with and leaves behind; many, since two streams must not share one."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("prefill attention has to run once before a graph of it is captured")
    numbers = torch.zeros(_NUM_COUNTERS, dtype=torch.int32, device=f"cuda:{device}")
    torch.cuda.synchronize(device)
    _KEPT.append(numbers)
    return list(range(numbers.data_ptr(), numbers.data_ptr() + numbers.nbytes, numbers.itemsize))


def _cache_map(cache: Tensor) -> Any:
    """A cache's boxes: 64 elements, 8 tokens, the halves of a head, one head, groups of tokens.

    A box is at most one tile's tokens of one block.
    """
    num_blocks, block_size, num_heads, head_dim = cache.shape
    head_bytes = head_dim * cache.itemsize
    token_bytes = num_heads * head_bytes
    sizes = (64, 8, head_dim // 64, num_heads, num_blocks * block_size // 8)
    strides = (token_bytes, 128, head_bytes, 8 * token_bytes)
    return tensor_map(
        cache.data_ptr(), cache.dtype, sizes, strides, (64, 8, head_dim // 64, 1, min(block_size, _KEYS) // 8)
    )


def _fake(*_: object) -> None:
    return None


PAGED_PREFILL_ATTENTION: Final = define_op(
    "paged_prefill_attention(Tensor query, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor cu_seqlens, "
    "Tensor seq_lens, int max_query_len, float scale, int sliding_window, float softcap, Tensor(a!) out, "
    "Tensor? visible_ends=None) -> ()",
    cpu=_cpu,
    fake=_fake,
    cuda=_cuda,
)
