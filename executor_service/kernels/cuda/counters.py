"""Counters in a GPU's memory, which a kernel's blocks count with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache
from typing import Final

import torch
from torch import Tensor

_NUM_COUNTERS: Final = 256
_KEPT: Final[list[Tensor]] = []


@cache
def counters(device: int) -> Iterator[int]:
    """Addresses of int32 zeros, which a launch counts with and leaves behind, one after the other without an end.

    Many, since two streams must not share one. RuntimeError if the first is asked for while a graph is captured.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a kernel that counts has to run once before a graph of it is captured")
    numbers = torch.zeros(_NUM_COUNTERS, dtype=torch.int32, device=f"cuda:{device}")
    torch.cuda.synchronize(device)
    _KEPT.append(numbers)
    return itertools.cycle(range(numbers.data_ptr(), numbers.data_ptr() + numbers.nbytes, numbers.itemsize))
