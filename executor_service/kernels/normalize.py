"""uint8 elements to normalised floats, by table: rescale, subtract the mean and divide by the deviation at once."""

from __future__ import annotations

from math import prod
from typing import Final

import torch
from torch import Tensor

from executor_service.kernels.cuda.module import INT, LONG, POINTER, dtype_name, kernel, num_multiprocessors
from executor_service.kernels.library import define_op

_THREADS: Final = 256
_IN_FLIGHT: Final = 4
"""Loads that a thread has under way, as the kernel is compiled."""


def normalize(tensor: Tensor, table: Tensor, channel_axis: int, dtype: torch.dtype) -> Tensor:
    """uint8 `tensor` of any shape -> `dtype`, same shape: element e of channel c becomes `table[c, e]`.

    `table` is float32 [num_channels, 256]; it holds what transformers computes for each level, so the
    result equals its rescale and normalise bit for bit (in float32).
    """
    result: Tensor = NORMALIZE(tensor, table, channel_axis, dtype)
    return result


def _cpu(tensor: Tensor, table: Tensor, channel_axis: int, dtype: torch.dtype) -> Tensor:
    out = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
    table = table.to(dtype)
    for channel in range(table.shape[0]):
        plane = tensor.select(channel_axis, channel)
        levels = plane.reshape(-1).to(torch.int32)
        out.select(channel_axis, channel).copy_(table[channel].index_select(0, levels).view(plane.shape))
    return out


def _cuda(tensor: Tensor, table: Tensor, channel_axis: int, dtype: torch.dtype) -> Tensor:
    tensor = tensor.contiguous()
    out = torch.empty_like(tensor, dtype=dtype)
    if not out.numel():
        return out
    num_channels, inner = table.shape[0], prod(tensor.shape[channel_axis % tensor.ndim + 1 :])
    name, count = f"normalize_{dtype_name(dtype)}", 16 // dtype.itemsize
    if inner % count or tensor.data_ptr() % count:
        launch = kernel("normalize", f"{name}_single", (POINTER,) * 3 + (LONG, LONG, INT), is_dependent=True)
        blocks = min(-(-out.numel() // _THREADS), 16 * num_multiprocessors(out.device.index))
        launch((blocks,), _THREADS, tensor, table, out, out.numel(), inner, num_channels)
        return out
    launch = kernel("normalize", f"{name}_wide", (POINTER,) * 3 + (INT,) * 3, is_dependent=True)
    packs = inner // count
    pieces = -(-packs // (_IN_FLIGHT * _THREADS))
    launch((out.numel() // inner * pieces,), _THREADS, tensor, table, out, packs, num_channels, pieces)
    return out


def _fake(tensor: Tensor, table: Tensor, channel_axis: int, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(tensor, dtype=dtype)


NORMALIZE: Final = define_op(
    "normalize(Tensor tensor, Tensor table, int channel_axis, ScalarType dtype) -> Tensor",
    cpu=_cpu,
    fake=_fake,
    cuda=_cuda,
)
