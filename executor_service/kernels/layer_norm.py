"""Layer normalisation (Ba, Kiros and Hinton, 2016), alone or together with the residual addition before it."""

from __future__ import annotations

from functools import cache
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from executor_service.kernels.cuda.module import FLOAT, INT, POINTER, Kernel, dtype_name, is_wide, kernel
from executor_service.kernels.library import define_op

_PACKS: Final = {"wide": (1, 4), "single": (4, 16)}
"""How many accesses of a row one thread holds, as the kernels are compiled."""
_MAX_THREADS: Final = 512


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """`x` [..., H], `weight` and `bias` [H] -> [..., H], in float32 inside."""
    result: Tensor = LAYER_NORM(x, weight, bias, epsilon)
    return result


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """`residual + x`, and that normalised as `layer_norm` does: two new tensors."""
    total, normal = ADD_LAYER_NORM(x, residual, weight, bias, epsilon)
    return total, normal


def _layer_norm_cpu(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, epsilon)


def _add_layer_norm_cpu(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    total = residual + x
    return total, _layer_norm_cpu(total, weight, bias, epsilon)


def _layer_norm_cuda(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    out = _layer_norm_fake(x, weight, bias, epsilon)
    if x.numel():
        width = x.shape[-1]
        launch, threads = _variant("layer_norm", x.dtype, width)
        launch((x.numel() // width,), threads, x.contiguous(), weight, bias, out, width, epsilon)
    return out


def _add_layer_norm_cuda(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    total, out = _add_layer_norm_fake(x, residual, weight, bias, epsilon)
    if x.numel():
        width = x.shape[-1]
        launch, threads = _variant("add_layer_norm", x.dtype, width)
        launch(
            (x.numel() // width,), threads, x.contiguous(), residual.contiguous(), weight, bias, total, out, width,
            epsilon,
        )  # fmt: skip
    return total, out


@cache
def _variant(op: str, dtype: torch.dtype, width: int) -> tuple[Kernel, int]:
    """The kernel whose blocks hold a row each in their registers, and the threads of a block."""
    kind = "wide" if is_wide(dtype, width) else "single"
    packs = -(-width // (16 // dtype.itemsize if kind == "wide" else 1))
    for packs_each in _PACKS[kind]:
        threads = -(-packs // (32 * packs_each)) * 32
        if threads <= _MAX_THREADS:
            types = (POINTER,) * (6 if op == "add_layer_norm" else 4) + (INT, FLOAT)
            name = f"{op}_{dtype_name(dtype)}_{kind}_{packs_each}"
            return kernel("layer_norm", name, types, is_dependent=True), threads
    raise ValueError(f"{op} takes rows of at most {_MAX_THREADS * _PACKS[kind][-1]} accesses, not of {packs}")


def _layer_norm_fake(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _add_layer_norm_fake(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    torch._check(x.shape == residual.shape)
    return _layer_norm_fake(x, weight, bias, epsilon), _layer_norm_fake(x, weight, bias, epsilon)


LAYER_NORM: Final = define_op(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float epsilon) -> Tensor",
    cpu=_layer_norm_cpu,
    fake=_layer_norm_fake,
    cuda=_layer_norm_cuda,
)
ADD_LAYER_NORM: Final = define_op(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float epsilon) -> (Tensor, Tensor)",
    cpu=_add_layer_norm_cpu,
    fake=_add_layer_norm_fake,
    cuda=_add_layer_norm_cuda,
)
