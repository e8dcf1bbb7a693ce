"""Root mean square normalisation (Zhang and Sennrich, 2019), alone or together with the residual addition before it."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from executor_service.kernels.cuda.module import FLOAT, INT, POINTER, dtype_name, is_wide, kernel
from executor_service.kernels.library import define_op

_MAX_THREADS: Final = 1024
_PACKS: Final = {"wide": (1, 2, 4), "single": (1, 4, 16)}
"""How many accesses of a row one thread may hold, as the kernels are compiled."""


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`x` [T, H], `weight` [H] -> [T, H]: `weight * x / sqrt(mean(x^2) + epsilon)`, the quotient in float32."""
    result: Tensor = RMS_NORM(x, weight, epsilon)
    return result


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`residual += x`, both [T, H], in place; returns the sum normalised as `rms_norm` does."""
    result: Tensor = ADD_RMS_NORM(x, residual, weight, epsilon)
    return result


def _rms_norm_cpu(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = x.to(torch.float32)
    variance = wide.pow(2).mean(-1, keepdim=True)
    return weight * (wide * torch.rsqrt(variance + epsilon)).to(x.dtype)


def _add_rms_norm_cpu(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return _rms_norm_cpu(residual.add_(x), weight, epsilon)


def _rms_norm_cuda(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    out = torch.empty_like(x)
    if x.numel():
        name, threads = _shape_of("rms_norm", x)
        launch = kernel("rms_norm", name, (POINTER, POINTER, POINTER, INT, FLOAT))
        launch((x.shape[0],), threads, x.contiguous(), weight, out, x.shape[1], epsilon)
    return out


def _add_rms_norm_cuda(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    out = torch.empty_like(x)
    if x.numel():
        name, threads = _shape_of("add_rms_norm", x)
        launch = kernel("rms_norm", name, (POINTER, POINTER, POINTER, POINTER, INT, FLOAT))
        launch((x.shape[0],), threads, x.contiguous(), residual, weight, out, x.shape[1], epsilon)
    return out


def _shape_of(op: str, x: Tensor) -> tuple[str, int]:
    """The variant that holds a row of `x` in the registers of one block, and that block's threads."""
    width = x.shape[1]
    kind = "wide" if is_wide(x.dtype, width) else "single"
    packs = -(-width // (16 // x.itemsize if kind == "wide" else 1))
    for packs_each in _PACKS[kind]:
        threads = -(-packs // packs_each)
        if threads <= _MAX_THREADS:
            return f"{op}_{dtype_name(x.dtype)}_{kind}_{packs_each}", -(-threads // 32) * 32
    raise ValueError(f"{op} takes rows of at most {_PACKS[kind][-1] * _MAX_THREADS} accesses, not of {packs}")


def _rms_norm_fake(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return torch.empty_like(x)


def _add_rms_norm_fake(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    torch._check(x.shape == residual.shape)
    return torch.empty_like(x)


RMS_NORM: Final = define_op(
    "rms_norm(Tensor x, Tensor weight, float epsilon) -> Tensor",
    cpu=_rms_norm_cpu,
    fake=_rms_norm_fake,
    cuda=_rms_norm_cuda,
)
ADD_RMS_NORM: Final = define_op(
    "add_rms_norm(Tensor x, Tensor(a!) residual, Tensor weight, float epsilon) -> Tensor",
    cpu=_add_rms_norm_cpu,
    fake=_add_rms_norm_fake,
    cuda=_add_rms_norm_cuda,
)
