"""The gate of a gated MLP: SiLU of one half times the other (SwiGLU, Shazeer 2020)."""

from __future__ import annotations

from typing import Final

import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from executor_service.kernels.cuda.module import INT, LONG, POINTER, dtype_name, is_wide, kernel, num_multiprocessors
from executor_service.kernels.library import define_op

_THREADS: Final = 256


def silu_mul(gate_up: Tensor) -> Tensor:
    """[T, 2 * I] -> [T, I]: `silu(gate) * up`, where `gate` is the first half of each row and `up` the second."""
    result: Tensor = SILU_MUL(gate_up)
    return result


def _cpu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _cuda(gate_up: Tensor) -> Tensor:
    rows, width = gate_up.numel() // gate_up.shape[-1], gate_up.shape[-1] // 2
    out = _fake(gate_up)
    if not out.numel():
        return out
    kind = "wide" if is_wide(gate_up.dtype, width) else "single"
    name = f"silu_mul_{dtype_name(gate_up.dtype)}_{kind}"
    blocks = min(-(-out.numel() * out.itemsize // (16 * _THREADS)), 8 * num_multiprocessors(out.device.index))
    launch = kernel("silu_mul", name, (POINTER, POINTER, LONG, INT))
    launch((blocks,), _THREADS, gate_up.contiguous(), out, rows, width)
    return out


def _fake(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


SILU_MUL: Final = define_op("silu_mul(Tensor gate_up) -> Tensor", cpu=_cpu, fake=_fake, cuda=_cuda)
