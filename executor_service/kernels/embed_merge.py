"""Token embeddings, and encoder features in their places among them, gathered in one pass."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from math import gcd
from typing import Final

import torch
from torch import Tensor

from executor_service.kernels.cuda.module import BY_VALUE, INT, POINTER, Kernel, kernel
from executor_service.kernels.library import define_op

_MAX_ITEMS: Final = 64
"""Items whose addresses go with one launch, as the kernel is compiled; more take further launches."""
_MAX_THREADS: Final = 512
_IN_FLIGHT: Final = 4
_ACCESSES_EACH: Final = 2
"""Of a row, for each thread: twice as many threads were faster than four accesses in flight in each."""


class _FeatureRows:
    """Addresses as an argument by value: no copy to the device, and a graph that is captured keeps them."""

    def __init__(self, features: Sequence[Tensor]) -> None:
        self._addresses = (ctypes.c_void_p * _MAX_ITEMS)(*(item.data_ptr() for item in features))

    def getPtr(self) -> int:  # noqa: N802 - what cuda-bindings asks of an argument
        return ctypes.addressof(self._addresses)


def embed_merge(token_ids: Tensor, table: Tensor, features: Sequence[Tensor], places: Tensor) -> Tensor:
    """`token_ids` [T] (int64), `table` [V, H], `features` [F_i, H] each -> [T, H] in the dtype of `table`.

    `places` [T, 2] (int32) are item and row: token t is `features[item][row]`, or `table[token_ids[t]]` where the item
    is -1. Ids of tokens that are features are not looked at. On a GPU `places` is not the work of the kernel just
    before, which may still run when it is read; a copy from the host is never too early.
    """
    result: Tensor = EMBED_MERGE(token_ids, table, list(features), places)
    return result


def _cpu(token_ids: Tensor, table: Tensor, features: Sequence[Tensor], places: Tensor) -> Tensor:
    items, rows = places.unbind(1)
    out = table.index_select(0, token_ids.masked_fill(items >= 0, 0))
    for number, item in enumerate(features):
        mask = items == number
        out[mask] = item[rows[mask]].to(out.dtype)
    return out


def _cuda(token_ids: Tensor, table: Tensor, features: Sequence[Tensor], places: Tensor) -> Tensor:
    out = _fake(token_ids, table, features, places)
    if not out.numel():
        return out
    features = [item.to(table.dtype).contiguous() for item in features]
    row_bytes = table.shape[1] * table.itemsize
    launch, threads, length = _variant(row_bytes, gcd(row_bytes, 16, *(t.data_ptr() for t in (table, *features))))
    for first in range(0, max(len(features), 1), _MAX_ITEMS):
        rows = _FeatureRows(features[first : first + _MAX_ITEMS])
        launch((len(out),), threads, token_ids, places, table, rows, first, out, length)
    return out


@cache
def _variant(row_bytes: int, alignment: int) -> tuple[Kernel, int, int]:
    """The kernel, its threads, and how many of its accesses a row has."""
    access = next(size for size in (16, 4, 2) if not alignment % size)
    length = row_bytes // access
    types = (POINTER,) * 3 + (BY_VALUE, INT, POINTER, INT)
    launch = kernel("embed_merge", f"embed_merge_{access}_{_IN_FLIGHT}", types, is_dependent=True)
    return launch, min(-(-length // (32 * _ACCESSES_EACH)) * 32, _MAX_THREADS), length


def _fake(token_ids: Tensor, table: Tensor, features: Sequence[Tensor], places: Tensor) -> Tensor:
    torch._check(places.shape == (token_ids.shape[0], 2))
    torch._check(all(item.shape[1] == table.shape[1] for item in features))
    return table.new_empty((token_ids.shape[0], table.shape[1]))


EMBED_MERGE: Final = define_op(
    "embed_merge(Tensor token_ids, Tensor table, Tensor[] features, Tensor places) -> Tensor",
    cpu=_cpu,
    fake=_fake,
    cuda=_cuda,
)
