"""Matrix products for a few rows, as decode steps have them: the weights stream once from memory, at the memory's rate.

16-bit weights go through a ring in shared memory to the tensor cores: on Hopper and later by a kernel for up to 16
rows, on Hopper by another for up to 128, to which it leaves all but the fewest rows, or all. Both ask for their first
weights while the kernel before them on the stream still runs (programmatic dependent launch), so a weight must not be
written by the kernel just before. Everything else takes a plain variant that is right but slow. Within a variant a
row's result depends neither on the other rows nor on how many there are, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import ceil
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from executor_service.kernels import small_linear_tiles
from executor_service.kernels.cuda.module import (
    INT,
    POINTER,
    dtype_name,
    is_wide,
    kernel,
    memory_rate,
    num_multiprocessors,
)
from executor_service.kernels.library import define_op
from executor_service.kernels.small_linear_tiles import Shape

MAX_ROWS: Final = small_linear_tiles.MOST_ROWS
"""Up to where it is ahead of cuBLAS (docs/notes/small_linear.md)."""
_FEW_ROWS: Final = 16
"""That x stays in registers for."""
FEWEST_ROWS: Final = {0.0: 2, 4e12: 0}
"""For which that is faster than tiles of a product for 16, by the rate of the GPU's memory."""
_MIN_ELEMENTS: Final = 1 << 20
"""Of a weight that is worth a kernel of its own."""
_COLUMNS: Final = 32
"""What the width is a multiple of: each lane's share of a row is 16 bytes, four lanes stand side by side."""
_PIECE: Final = 1024
"""Columns of the weight in a stage."""
_TILE_ROWS: Final = 16
_PAD_BYTES: Final = 64
_WARPS: Final = 8
_SUMS_BYTES: Final = 2 * _WARPS * 8 * 20 * 4
_SHARED_BYTES: Final = 220 * 1024
"""Of every block: one fits on a multiprocessor, and the next kernel's takes its place when it ends."""


def small_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """`x` [M, K], `weight` [N, K], `bias` [N], `residual` [M, N] -> [M, N]: `x @ weight.T + bias + residual`.

    All of one dtype; summed in float32 and rounded once.
    """
    result: Tensor = SMALL_LINEAR(x, weight, bias, residual)
    return result


def small_linear_silu_mul(x: Tensor, gate_up: Tensor) -> Tensor:
    """`x` [M, K], `gate_up` [2 * F, K] -> [M, F]: `silu(x @ gate.T) * (x @ up.T)`, `gate` the first F rows.

    Both products, the activation and the result are rounded to the dtype, as `small_linear` and `silu_mul` do it.
    """
    result: Tensor = SMALL_LINEAR_SILU_MUL(x, gate_up)
    return result


def takes(rows: int, weight: Tensor) -> bool:
    """Whether the product of so many rows of x with this weight is faster here than in cuBLAS."""
    if weight.numel() < _MIN_ELEMENTS or not weight.is_cuda or not weight.is_contiguous():
        return False
    if rows > MAX_ROWS:
        return False
    if _streams(rows, weight):
        return True
    # Gated or not: of the two, the gated product asks for more.
    shape = Shape("gated", rows, weight.shape[0] // 2, weight.shape[1], weight.dtype, weight.device.index)
    return small_linear_tiles.takes(shape) and weight.shape[0] % 2 == 0 and weight.data_ptr() % 16 == 0


@cache
def fewest_rows(device: int) -> int:
    """Up to which tiles leave products to the variant for a few rows, where there are both."""
    rate = memory_rate(device)
    return FEWEST_ROWS[max(least for least in FEWEST_ROWS if least <= rate)]


def _streams(rows: int, weight: Tensor) -> bool:
    """Whether the variant for a few rows can have it."""
    return (
        rows <= _FEW_ROWS
        and weight.dtype.itemsize == 2
        and weight.shape[1] % _COLUMNS == 0
        and weight.shape[1] > 0
        and weight.data_ptr() % 16 == 0
        and _has_bulk_copies(weight.device.index)
    )


@cache
def _has_bulk_copies(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def _linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    wide = x.dtype if x.dtype.itemsize >= 4 else torch.float32
    result = F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    return (result if residual is None else result + residual.to(wide)).to(x.dtype)


def _silu_mul_cpu(x: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = _linear_cpu(x, gate_up, None, None).chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _linear_cuda(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    out = x.new_empty((x.shape[0], weight.shape[0]))
    if out.numel():
        _launch("plain", x.contiguous(), weight.contiguous(), bias, residual, out)
    return out


def _silu_mul_cuda(x: Tensor, gate_up: Tensor) -> Tensor:
    out = x.new_empty((x.shape[0], gate_up.shape[0] // 2))
    if out.numel():
        _launch("gated", x.contiguous(), gate_up.contiguous(), None, None, out)
    return out


def _launch(kind: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> None:
    rows, width = x.shape
    if width != weight.shape[1]:
        raise ValueError(f"x has {width} columns, the weight {weight.shape[1]}")
    bias, residual = (None if tensor is None else tensor.contiguous() for tensor in (bias, residual))
    is_aligned = not any(tensor.data_ptr() % 16 for tensor in (x, weight, residual) if tensor is not None)
    shape = Shape(kind, rows, out.shape[1], width, x.dtype, weight.device.index)
    is_streamed, has_tiles = is_aligned and _streams(rows, weight), is_aligned and small_linear_tiles.takes(shape)
    if has_tiles and not (is_streamed and rows <= fewest_rows(shape.device)):
        launch = small_linear_tiles.launcher(shape)
    elif is_streamed:
        launch = _streaming(kind, rows, out.shape[1], width, x.dtype, weight.device.index)
    else:
        access = "wide" if is_aligned and is_wide(x.dtype, width) else "single"
        variant = f"{dtype_name(x.dtype)}_{kind}_{access}"
        launch = _plain(variant, rows, out.shape[1], width, weight.device.index)
    launch(x, weight, 0 if bias is None else bias, 0 if residual is None else residual, out)


_POINTERS: Final = (POINTER,) * 5
"""x, weight, bias, residual, out."""


@cache
def _streaming(kind: str, rows: int, features: int, width: int, dtype: torch.dtype, device: int) -> Callable[..., None]:
    """The launch of the streaming variant, tensors left to be given."""
    groups = ceil(rows / 8)
    name = f"small_linear_{dtype_name(dtype)}_{kind}_{groups}"
    launch = kernel("small_linear", name, (*_POINTERS, *(INT,) * 4), _SHARED_BYTES, is_dependent=True)
    grid, threads = (num_multiprocessors(device),), 32 * (_WARPS + 1)
    return lambda *tensors: launch(grid, threads, *tensors, rows, features, width, _num_stages())


def _num_stages() -> int:
    """Tiles that shared memory holds beside the warps' sums, with two barriers of 8 bytes each."""
    stage_bytes = _TILE_ROWS * (2 * _PIECE + _PAD_BYTES) + 16
    return (_SHARED_BYTES - _SUMS_BYTES) // stage_bytes


@cache
def _plain(variant: str, rows: int, features: int, width: int, device: int) -> Callable[..., None]:
    """The launch of the variant for all sizes and dtypes."""
    launch = kernel("small_linear_any", f"small_linear_any_{variant}", (*_POINTERS, *(INT,) * 3), is_dependent=True)
    grid = (ceil(features / 8), ceil(rows / 8))
    return lambda *tensors: launch(grid, 256, *tensors, rows, features, width)


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    torch._check(x.shape[1] == weight.shape[1])
    return x.new_empty((x.shape[0], weight.shape[0]))


def _silu_mul_fake(x: Tensor, gate_up: Tensor) -> Tensor:
    torch._check(x.shape[1] == gate_up.shape[1])
    return x.new_empty((x.shape[0], gate_up.shape[0] // 2))


SMALL_LINEAR: Final = define_op(
    "small_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual) -> Tensor",
    cpu=_linear_cpu,
    fake=_linear_fake,
    cuda=_linear_cuda,
)
SMALL_LINEAR_SILU_MUL: Final = define_op(
    "small_linear_silu_mul(Tensor x, Tensor gate_up) -> Tensor",
    cpu=_silu_mul_cpu,
    fake=_silu_mul_fake,
    cuda=_silu_mul_cuda,
)
