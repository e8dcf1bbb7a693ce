"""The gate of a gated MLP: SiLU of one half times the other (SwiGLU, Shazeer 2020)."""

from __future__ import annotations

from typing import Final

import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from executor_service.kernels.library import define_op


def silu_mul(gate_up: Tensor) -> Tensor:
    """[T, 2 * I] -> [T, I]: `silu(gate) * up`, where `gate` is the first half of each row and `up` the second."""
    result: Tensor = SILU_MUL(gate_up)
    return result


def _cpu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _fake(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


SILU_MUL: Final = define_op("silu_mul(Tensor gate_up) -> Tensor", cpu=_cpu, fake=_fake)
