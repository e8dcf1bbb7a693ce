"""Root mean square normalisation (Zhang and Sennrich, 2019), alone or together with the residual addition before it."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from executor_service.kernels.library import define_op


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


def _rms_norm_fake(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return torch.empty_like(x)


def _add_rms_norm_fake(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    torch._check(x.shape == residual.shape)
    return torch.empty_like(x)


RMS_NORM: Final = define_op(
    "rms_norm(Tensor x, Tensor weight, float epsilon) -> Tensor", cpu=_rms_norm_cpu, fake=_rms_norm_fake
)
ADD_RMS_NORM: Final = define_op(
    "add_rms_norm(Tensor x, Tensor(a!) residual, Tensor weight, float epsilon) -> Tensor",
    cpu=_add_rms_norm_cpu,
    fake=_add_rms_norm_fake,
)
