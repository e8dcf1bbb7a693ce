"""CLIP's activation: x * sigmoid(1.702 * x) (Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, section 2)."""

from __future__ import annotations

from functools import cache
from typing import Final

import torch
from torch import Tensor

from executor_service.kernels.cuda.module import LONG, POINTER, Kernel, dtype_name, kernel
from executor_service.kernels.library import define_op

_THREADS: Final = 256
_PACKS: Final = 4
"""Accesses of a thread, as the kernel is compiled."""


def quick_gelu(x: Tensor) -> Tensor:
    """Any shape -> the same: `x * sigmoid(1.702 * x)`, rounded to the dtype after each of the three operations."""
    result: Tensor = QUICK_GELU(x)
    return result


def _cpu(x: Tensor) -> Tensor:
    return torch.sigmoid_(1.702 * x).mul_(x)


def _cuda(x: Tensor) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    count = x.numel()
    if count:
        x = x.contiguous()
        launch, per_block = _variant(x.dtype, (count * x.itemsize) % 16 == 0 and x.data_ptr() % 16 == 0)
        launch((-(-count // per_block),), _THREADS, x, out, count)
    return out


@cache
def _variant(dtype: torch.dtype, is_wide: bool) -> tuple[Kernel, int]:
    """The kernel, and how many elements a block takes."""
    name = f"quick_gelu_{dtype_name(dtype)}_{'wide' if is_wide else 'single'}"
    per_access = 16 // dtype.itemsize if is_wide else 1
    return kernel("quick_gelu", name, (POINTER, POINTER, LONG), is_dependent=True), _THREADS * _PACKS * per_access


def _fake(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


QUICK_GELU: Final = define_op("quick_gelu(Tensor x) -> Tensor", cpu=_cpu, fake=_fake, cuda=_cuda)
