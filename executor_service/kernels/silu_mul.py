"""The gate of a gated MLP: SiLU of one half times the other (SwiGLU, Shazeer 2020)."""

from __future__ import annotations

from functools import cache
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from executor_service.kernels.cuda.module import INT, POINTER, Kernel, dtype_name, is_wide, kernel, num_multiprocessors
from executor_service.kernels.library import define_op

_THREADS_OF_FEW_ROWS: Final = 128
_MAX_THREADS: Final = 512
_PACKS_OF_MANY_ROWS: Final = 4
"""Loads of each half that a thread has under way, where there are rows for every multiprocessor."""


def silu_mul(gate_up: Tensor) -> Tensor:
    """[T, 2 * I] -> [T, I]: `silu(gate) * up`, where `gate` is the first half of each row and `up` the second."""
    result: Tensor = SILU_MUL(gate_up)
    return result


def _cpu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _cuda(gate_up: Tensor) -> Tensor:
    out = _fake(gate_up)
    if out.numel():
        rows, width = out.numel() // out.shape[-1], out.shape[-1]
        is_many = rows >= 2 * num_multiprocessors(out.device.index)
        launch, pieces, threads = _variant(gate_up.dtype, width, is_many)
        launch((rows, pieces), threads, gate_up.contiguous(), out, width)
    return out


@cache
def _variant(dtype: torch.dtype, width: int, is_many: bool) -> tuple[Kernel, int, int]:
    """The kernel, into how many blocks it cuts a row, and the threads of a block."""
    kind = "wide" if is_wide(dtype, width) else "single"
    packs = width * dtype.itemsize // 16 if kind == "wide" else width
    packs_each = _PACKS_OF_MANY_ROWS if is_many or kind == "single" else 1
    pieces = -(-packs // (packs_each * (_MAX_THREADS if is_many else _THREADS_OF_FEW_ROWS)))
    threads = -(-packs // (pieces * packs_each * 32)) * 32
    name = f"silu_mul_{dtype_name(dtype)}_{kind}_{packs_each}"
    return kernel("silu_mul", name, (POINTER, POINTER, INT), is_dependent=True), pieces, threads


def _fake(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


SILU_MUL: Final = define_op("silu_mul(Tensor gate_up) -> Tensor", cpu=_cpu, fake=_fake, cuda=_cuda)
