"""A decoder layer behind attention, and the next layer's first product, for few rows: one kernel on Hopper.

Between kernels blocks end and begin together, and memory has nothing to do for two microseconds; in a chain the next
product's weights come while blocks wait for each other. Everywhere else the same is done by an op for each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from executor_service.kernels import small_linear, small_linear_tiles
from executor_service.kernels.cuda.counters import counters
from executor_service.kernels.cuda.module import BY_VALUE, FLOAT, INT, POINTER, dtype_name, kernel
from executor_service.kernels.library import define_op
from executor_service.kernels.rms_norm import RMS_NORM
from executor_service.kernels.small_linear import SMALL_LINEAR, SMALL_LINEAR_SILU_MUL
from executor_service.kernels.small_linear_tiles import SHARED_BYTES, SPLITS, THREADS, Ranges, Shape

MOST_ROWS: Final = 64
_SOURCE: Final = "linear_chain"
_MOST_PARTS: Final = 72
"""Clusters that leave parts of a row's squares."""
_THREADS: Final = THREADS + 32
"""A warp finds what norms divide by."""
_TYPES: Final = (*[BY_VALUE] * 12, *[POINTER] * 12, *[FLOAT] * 2, *[INT] * 18)


def linear_chain(
    x: Tensor,
    residual: Tensor,
    output: Tensor,
    mlp_norm: Tensor,
    gate_up: Tensor,
    down: Tensor,
    next_norm: Tensor,
    epsilons: Sequence[float],
    qkv: Tensor | None = None,
    qkv_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The residual stream behind a layer, [M, H], and what the next one makes of it, [M, Q] or without `qkv` [M, H].

    `x` [M, A] is what attention gives, `residual` [M, H] the stream before it: `residual + x @ output.T`, then
    `+ silu(gate) * up @ down.T` of its `rms_norm`, then the `rms_norm` of that, times `qkv.T + qkv_bias`. `output`
    [H, A], `gate_up` [2 * F, H], the gate's rows first, `down` [H, F], `qkv` [Q, H], norms' weights [H], and an
    epsilon for each. Every step is
    rounded as `small_linear`, `small_linear_silu_mul` and `rms_norm` do it, or less often.
    """
    result: tuple[Tensor, Tensor] = LINEAR_CHAIN(
        x, residual, output, mlp_norm, gate_up, down, next_norm, epsilons, qkv, qkv_bias
    )
    return result


def takes(rows: int, *weights: Tensor) -> bool:
    """Whether there is a kernel for so many rows and these weights: `output`, `gate_up`, `down`, perhaps `qkv`."""
    output, gate_up, *_ = weights
    return (
        0 < rows <= MOST_ROWS
        and output.dtype == torch.bfloat16
        and all(small_linear.takes(rows, weight) for weight in weights)
        and all(small_linear_tiles.takes(shape) for shape in _shapes(rows, output, gate_up, *weights[2:]))
    )


def _shapes(rows: int, output: Tensor, gate_up: Tensor, *others: Tensor) -> tuple[Shape, ...]:
    """Of the products, in their order."""

    def shape(weight: Tensor, kind: str = "plain") -> Shape:
        features = weight.shape[0] // (2 if kind == "gated" else 1)
        return Shape(kind, rows, features, weight.shape[1], weight.dtype, weight.device.index)

    return shape(output), shape(gate_up, "gated"), *map(shape, others)


class _Launch(NamedTuple):
    """All of a launch that does not depend on where tensors are."""

    run: Callable[..., None]
    ranges: tuple[Ranges, ...]
    zeros: Iterator[int]


def _linear_chain_cuda(
    x: Tensor,
    residual: Tensor,
    output: Tensor,
    mlp_norm: Tensor,
    gate_up: Tensor,
    down: Tensor,
    next_norm: Tensor,
    epsilons: Sequence[float],
    qkv: Tensor | None = None,
    qkv_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    weights = (output, gate_up, down) if qkv is None else (output, gate_up, down, qkv)
    x, residual = x.contiguous(), residual.contiguous()
    is_aligned = not any(tensor.data_ptr() % 16 for tensor in (x, residual, mlp_norm, next_norm))
    if not is_aligned or not takes(x.shape[0], *weights):
        return _step_by_step("cuda", x, residual, output, mlp_norm, gate_up, down, next_norm, epsilons, qkv, qkv_bias)
    rows = x.shape[0]
    middle, weighted, out, next_weighted = (torch.empty_like(residual) for _ in range(4))
    inner, squares = x.new_empty((rows, down.shape[1])), x.new_empty((2, rows, _MOST_PARTS), dtype=torch.float32)
    result = out if qkv is None else x.new_empty((rows, qkv.shape[0]))
    launch = _launch(_shapes(rows, *weights))
    products = zip(launch.ranges, weights, (x, weighted, inner, next_weighted), strict=False)
    maps = [one for ranges, weight, of in products for one in ranges.maps(weight, of)]
    launch.run(
        *maps, *maps[: 12 - len(maps)], residual, mlp_norm, next_norm, 0 if qkv_bias is None else qkv_bias,
        middle, weighted, inner, out, next_weighted, result, squares, next(launch.zeros), *epsilons,
    )  # fmt: skip
    return out, RMS_NORM.direct("cuda")(out, next_norm, epsilons[1]) if qkv is None else result


@cache
def _launch(shapes: tuple[Shape, ...]) -> _Launch:
    first = shapes[0]
    name = f"linear_chain_{dtype_name(first.dtype)}_{first.compiled_rows}"
    clusters = min(small_linear_tiles.most_clusters(_SOURCE, name, _TYPES, _THREADS), _MOST_PARTS)
    ranges = tuple(Ranges.among(clusters, shape) for shape in shapes)
    function = kernel(_SOURCE, name, _TYPES, SHARED_BYTES, SPLITS, is_dependent=True)
    grid = (max(each.clusters for each in ranges) * SPLITS,)
    numbers = [number for each in ranges for number in each.numbers] + [0, 0, 0] * (4 - len(ranges))
    num_x_stages, num_stages = small_linear_tiles.stages(first)
    parts = ranges[0].clusters, ranges[2].clusters
    sizes = *parts, len(shapes), first.rows, num_stages, num_x_stages
    return _Launch(lambda *places: function(grid, _THREADS, *places, *numbers, *sizes), ranges, counters(first.device))


def _step_by_step(
    device: str,
    x: Tensor,
    residual: Tensor,
    output: Tensor,
    mlp_norm: Tensor,
    gate_up: Tensor,
    down: Tensor,
    next_norm: Tensor,
    epsilons: Sequence[float],
    qkv: Tensor | None = None,
    qkv_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same by an op for each step."""
    linear, gated, norm = (op.direct(device) for op in (SMALL_LINEAR, SMALL_LINEAR_SILU_MUL, RMS_NORM))
    middle = linear(x, output, None, residual)
    out = linear(gated(norm(middle, mlp_norm, epsilons[0]), gate_up), down, None, middle)
    normal = norm(out, next_norm, epsilons[1])
    return out, normal if qkv is None else linear(normal, qkv, qkv_bias, None)


def _linear_chain_fake(x: Tensor, residual: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    torch._check(x.shape[0] == residual.shape[0])
    qkv = others[6] if len(others) > 6 else None
    return torch.empty_like(residual), x.new_empty((len(x), residual.shape[1] if qkv is None else qkv.shape[0]))


LINEAR_CHAIN: Final = define_op(
    "linear_chain(Tensor x, Tensor residual, Tensor output, Tensor mlp_norm, Tensor gate_up, Tensor down, "
    "Tensor next_norm, float[2] epsilons, Tensor? qkv=None, Tensor? qkv_bias=None) -> (Tensor, Tensor)",
    cpu=partial(_step_by_step, "cpu"),
    fake=_linear_chain_fake,
    cuda=_linear_chain_cuda,
)
