"""Root mean square normalisation (Zhang and Sennrich, 2019), alone or together with the residual addition before it."""

from __future__ import annotations

from functools import cache
from typing import Final

import torch
from torch import Tensor

from executor_service.kernels.cuda.module import FLOAT, INT, POINTER, Kernel, dtype_name, is_wide, kernel
from executor_service.kernels.library import define_op

_VARIANTS: Final = {
    "wide": {1: 512, 2: 512, 4: 512, 8: 512},
    "single": {4: 512, 16: 1024},
}
"""How many accesses of a row one thread holds, and the most threads of such a block, as the kernels are compiled."""


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
    factor = wide.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
    return (wide * factor).to(x.dtype).mul_(weight)


def _add_rms_norm_cpu(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return _rms_norm_cpu(residual.add_(x), weight, epsilon)


def _rms_norm_cuda(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        rows, width = x.shape
        launch, threads = _variant("rms_norm", x.dtype, width)
        launch((rows,), threads, x.contiguous(), weight, out, width, epsilon)
    return out


def _add_rms_norm_cuda(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        rows, width = x.shape
        launch, threads = _variant("add_rms_norm", x.dtype, width)
        launch((rows,), threads, x.contiguous(), residual, weight, out, width, epsilon)
    return out


@cache
def _variant(op: str, dtype: torch.dtype, width: int) -> tuple[Kernel, int]:
    """The kernel whose blocks hold a row each in their registers, and the threads of a block."""
    kind = "wide" if is_wide(dtype, width) else "single"
    packs = -(-width // (16 // dtype.itemsize if kind == "wide" else 1))
    for packs_each, max_threads in _VARIANTS[kind].items():
        threads = -(-packs // (32 * packs_each)) * 32
        if threads <= max_threads:
            types = (POINTER,) * (3 + (op == "add_rms_norm")) + (INT, FLOAT)
            name = f"{op}_{dtype_name(dtype)}_{kind}_{packs_each}"
            return kernel("rms_norm", name, types, is_dependent=True), threads
    most = max(packs_each * max_threads for packs_each, max_threads in _VARIANTS[kind].items())
    raise ValueError(f"{op} takes rows of at most {most} accesses, not of {packs}")


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
