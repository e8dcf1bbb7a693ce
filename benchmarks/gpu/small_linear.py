"""The four matrices of a decoder's layers back to back in one graph, nothing reused: small_linear against cuBLAS.

Every layer is qkv, output, gate_up with SiLU, down; the first three take the same x, down what gate_up gave.
The floor is the weights' bytes over the best read rate of the same run. cuBLAS runs the same chain with `silu_mul` for
the gate, and the four matrices alone. Then the same as a decoder has it, with norms and the residual stream in between.
Then every matrix of both geometries by itself.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from benchmarks.gpu.options import parse_for_gpu
from benchmarks.gpu.timing import PASSES, Ceilings, measure_ceilings, rotating_copies, seconds_each
from benchmarks.results import make_parser, spread, write_result
from executor_service.kernels.rms_norm import RMS_NORM
from executor_service.kernels.silu_mul import SILU_MUL
from executor_service.kernels.small_linear import SMALL_LINEAR, SMALL_LINEAR_SILU_MUL
from executor_service.kernels.small_linear_tiles import MOST_ROWS

DTYPE = torch.bfloat16
LAYERS = 32
WIDTH = 4096
EPSILON = 1e-5
GEOMETRIES = {"llama-7b": (3 * WIDTH, 11008), "mistral-7b": (WIDTH + 2 * 1024, 14336)}
"""Rows of the qkv matrix, and the MLP's inner width."""
VOCABULARY = 32064
ROWS = (1, 2, 4, 8, 16, 32, 64, 96, 128)
LAYER_ROWS = (1, 8, 16, 32, 64)
MATRIX_ROWS = (1, 8, 16, 64, 96, 128)
REPLAYS = 5

Layer = tuple[Tensor, Tensor, Tensor, Tensor]


def main(argv: list[str] | None = None) -> int:
    """Print and write milliseconds, bytes per second and shares of the read rate."""
    parser = make_parser("gpu.small_linear", __doc__)
    options = parse_for_gpu(parser, argv)
    load_before = os.getloadavg()[0]
    ceilings = measure_ceilings()
    print(f"{torch.cuda.get_device_name()}: read {ceilings.read / 1e9:.0f} GB/s")
    figures: dict[str, object] = {
        "device": torch.cuda.get_device_name(), "read_bytes_per_second": ceilings.read,
    }  # fmt: skip
    for name in list(GEOMETRIES)[: 1 if options.quick else None]:
        figures.update(measure_geometry(name, options.quick, ceilings))
        torch.cuda.empty_cache()
    if not options.quick:
        for features, width in matrices():
            figures[f"{features} x {width}"] = measure_matrix(features, width, ceilings)
    write_result("gpu_small_linear", figures, options, load_before)
    return 0


def measure_geometry(name: str, is_quick: bool, ceilings: Ceilings) -> dict[str, object]:
    """Chains and layers of the same weights."""
    layers = [make_layer(*GEOMETRIES[name]) for _ in range(4 if is_quick else LAYERS)]
    return {
        f"chain, {name}": measure_chains(name, layers, ROWS[:2] if is_quick else ROWS, ceilings),
        f"layers, {name}": measure_layers(name, layers, LAYER_ROWS[:1] if is_quick else LAYER_ROWS, ceilings),
    }


def measure_chains(
    name: str, layers: Sequence[Layer], all_rows: Sequence[int], ceilings: Ceilings
) -> dict[str, object]:
    """All layers, per number of rows: ours where it streams, cuBLAS and silu_mul, cuBLAS alone."""
    num_layers, num_bytes = len(layers), bytes_of(layers)
    result: dict[str, object] = {"bytes": num_bytes}
    for rows in all_rows:
        x = normal(rows, WIDTH)
        arms = {"cublas": cublas_chain, "cublas without silu": cublas_products}
        if rows <= MOST_ROWS:
            arms = {"small_linear": our_chain, **arms}
        times = interleaved([partial(arm, layers, x) for arm in arms.values()])
        result[f"{rows} rows"] = {
            arm: figures_of(f"{name} x {num_layers}, {rows:2d} rows, {arm}", seconds, num_bytes, ceilings)
            for arm, seconds in zip(arms, times, strict=True)
        }
    return result


def measure_layers(
    name: str, layers: Sequence[Layer], all_rows: Sequence[int], ceilings: Ceilings
) -> dict[str, object]:
    """All that a decoder has between attentions, per number of rows: ours, and cuBLAS with our small kernels."""
    num_layers, num_bytes = len(layers), bytes_of(layers)
    norm = torch.ones(WIDTH, device="cuda", dtype=DTYPE)
    arms = {"small_linear": our_layers, "cublas": cublas_layers}
    result: dict[str, object] = {"bytes": num_bytes}
    for rows in all_rows:
        x = normal(rows, WIDTH)
        times = interleaved([partial(arm, layers, norm, x) for arm in arms.values()])
        result[f"{rows} rows"] = {
            arm: figures_of(f"{name} x {num_layers} with norms, {rows:2d} rows, {arm}", seconds, num_bytes, ceilings)
            for arm, seconds in zip(arms, times, strict=True)
        }
    return result


def measure_matrix(features: int, width: int, ceilings: Ceilings) -> dict[str, object]:
    """One matrix over and over, copies of it taking turns."""
    num_bytes = features * width * DTYPE.itemsize
    weights = [one for (one,) in rotating_copies(lambda: (make_weight(features, width),), num_bytes)]
    result: dict[str, object] = {}
    for rows in MATRIX_ROWS:
        x = normal(rows, width)
        for arm, product in (("small_linear", our_product), ("cublas", F.linear)):
            seconds = seconds_each([partial(product, x, weight) for weight in weights])
            name = f"{features} x {width}, {rows} rows, {arm}"
            result[f"{rows} rows, {arm}"] = figures_of(name, seconds, num_bytes, ceilings)
    return result


def bytes_of(layers: Sequence[Layer]) -> int:
    """Of all weights."""
    return sum(weight.numel() * weight.itemsize for layer in layers for weight in layer)


def matrices() -> list[tuple[int, int]]:
    """[features, width] of both geometries, none twice, and of the last product."""
    found = [(VOCABULARY, WIDTH)]
    for qkv, inner in GEOMETRIES.values():
        found += [(qkv, WIDTH), (WIDTH, WIDTH), (2 * inner, WIDTH), (WIDTH, inner)]
    return list(dict.fromkeys(found))


def interleaved(calls: Sequence[Callable[[], object]]) -> list[list[float]]:
    """Seconds of each call, `PASSES` times in turns, each as a graph replayed a few times."""
    graphs = [captured(call) for call in calls]
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(PASSES):
        for graph, found in zip(graphs, seconds, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(REPLAYS):
                graph.replay()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / 1000 / REPLAYS)
    return seconds


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of the call, that has run once."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    return graph


def figures_of(name: str, seconds: Sequence[float], num_bytes: int, ceilings: Ceilings) -> dict[str, object]:
    """Printed and returned."""
    median = statistics.median(seconds)
    rate = num_bytes / median
    print(f"{name:<48} {1e3 * median:8.4f} ms {rate / 1e9:6.0f} GB/s {rate / ceilings.read:6.1%}", flush=True)
    return {
        "milliseconds": spread([1e3 * value for value in seconds]),
        "bytes_per_second": rate,
        "share_of_read_rate": rate / ceilings.read,
    }


def make_layer(qkv: int, inner: int) -> Layer:
    """Weights of one layer."""
    return make_weight(qkv, WIDTH), make_weight(WIDTH, WIDTH), make_weight(2 * inner, WIDTH), make_weight(WIDTH, inner)


def make_weight(features: int, width: int) -> Tensor:
    """Random; keeps the size of what it is multiplied with."""
    return normal(features, width).mul_(width**-0.5)


def normal(*shape: int) -> Tensor:
    """Random elements."""
    return torch.randn(shape, device="cuda", dtype=DTYPE)


def our_product(x: Tensor, weight: Tensor) -> Tensor:
    """One product."""
    result: Tensor = SMALL_LINEAR.direct("cuda")(x, weight, None, None)
    return result


def our_chain(layers: Sequence[Layer], x: Tensor) -> None:
    """Four kernels a layer."""
    linear, gated = SMALL_LINEAR.direct("cuda"), SMALL_LINEAR_SILU_MUL.direct("cuda")
    for qkv, output, gate_up, down in layers:
        linear(x, qkv, None, None)
        linear(x, output, None, x)
        linear(gated(x, gate_up), down, None, x)


def our_layers(layers: Sequence[Layer], norm: Tensor, x: Tensor) -> None:
    """Six kernels a layer; what attention would give is x."""
    linear, gated = SMALL_LINEAR.direct("cuda"), SMALL_LINEAR_SILU_MUL.direct("cuda")
    rms_norm = RMS_NORM.direct("cuda")
    residual = x
    for qkv, output, gate_up, down in layers:
        residual = linear(x, output, None, residual)
        residual = linear(gated(rms_norm(residual, norm, EPSILON), gate_up), down, None, residual)
        linear(rms_norm(residual, norm, EPSILON), qkv, None, None)


def cublas_layers(layers: Sequence[Layer], norm: Tensor, x: Tensor) -> None:
    """Seven."""
    silu_mul, rms_norm = SILU_MUL.direct("cuda"), RMS_NORM.direct("cuda")
    residual = x.clone()
    for qkv, output, gate_up, down in layers:
        residual.addmm_(x, output.t())
        inner = silu_mul(F.linear(rms_norm(residual, norm, EPSILON), gate_up))
        residual.addmm_(inner, down.t())
        F.linear(rms_norm(residual, norm, EPSILON), qkv)


def cublas_chain(layers: Sequence[Layer], x: Tensor) -> None:
    """The same, without the residuals."""
    silu_mul = SILU_MUL.direct("cuda")
    for qkv, output, gate_up, down in layers:
        F.linear(x, qkv)
        F.linear(x, output)
        F.linear(silu_mul(F.linear(x, gate_up)), down)


def cublas_products(layers: Sequence[Layer], x: Tensor) -> None:
    """The matrices alone."""
    wide = x.new_ones((x.shape[0], layers[0][3].shape[1]))
    for qkv, output, gate_up, down in layers:
        for y, weight in ((x, qkv), (x, output), (x, gate_up), (wide, down)):
            F.linear(y, weight)


if __name__ == "__main__":
    sys.exit(main())
