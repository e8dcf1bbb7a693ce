"""Streaming kernels against the floor: bytes read over the best read rate plus bytes written over the best write rate.

Both rates are measured in the same run with our own read and write kernels. Beside each kernel stands the same work
in torch's own operations. Inputs rotate so that none is found in the L2 cache.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from benchmarks.gpu.timing import Ceilings, measure_ceilings, rotating_copies, seconds_each
from benchmarks.results import make_parser, spread, write_result
from executor_service.kernels.rms_norm import ADD_RMS_NORM
from executor_service.kernels.rotary_write_kv import ROTARY_WRITE_KV
from executor_service.kernels.silu_mul import SILU_MUL

WIDTH, INNER, HEADS, HEAD_DIM, BLOCK_SIZE = 4096, 11008, 32, 128, 16
TOKENS = (1, 16, 256, 4096, 16384)
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One kernel at one size: its inputs, both ways to compute it, and the bytes that must move."""

    name: str
    make: Callable[[], Sequence[Tensor]]
    ours: Callable[..., object]
    torchs: Callable[..., object]
    bytes_read: int
    bytes_written: int


def main(argv: list[str] | None = None) -> int:
    """Print and write microseconds, floors and ratios."""
    parser = make_parser("gpu.streaming", __doc__)
    options = parser.parse_args(argv)
    load_before = os.getloadavg()[0]
    ceilings = measure_ceilings()
    print(f"read {ceilings.read / 1e9:.0f} GB/s, write {ceilings.write / 1e9:.0f} GB/s")
    figures: dict[str, object] = {
        "device": torch.cuda.get_device_name(), "read_bytes_per_second": ceilings.read,
        "write_bytes_per_second": ceilings.write,
    }  # fmt: skip
    for tokens in TOKENS[:2] if options.quick else TOKENS:
        for case in cases(tokens):
            figures[f"{case.name}, {tokens} tokens"] = measure(case, tokens, ceilings)
    write_result("gpu_streaming", figures, options, load_before)
    return 0


def measure(case: Case, tokens: int, ceilings: Ceilings) -> dict[str, object]:
    """Both arms on the same inputs."""
    inputs = rotating_copies(case.make, case.bytes_read + case.bytes_written)
    ours = seconds_each([lambda a=arguments: case.ours(*a) for arguments in inputs])
    torchs = seconds_each([lambda a=arguments: case.torchs(*a) for arguments in inputs])
    floor = ceilings.floor(case.bytes_read, case.bytes_written)
    median = statistics.median(ours)
    print(
        f"{case.name:<16} {tokens:6d} tokens  {1e6 * median:8.2f} µs  {floor / median:6.1%} of the floor,"
        f" torch {1e6 * statistics.median(torchs):8.2f} µs"
    )
    return {
        "microseconds": spread([1e6 * value for value in ours]),
        "torch_microseconds": spread([1e6 * value for value in torchs]),
        "floor_microseconds": 1e6 * floor,
        "floor_over_measured": floor / median,
    }


def cases(tokens: int) -> list[Case]:
    """LLaVA-1.5-7B's shapes."""
    row, gate, head = 2 * tokens * WIDTH, 2 * tokens * INNER, 2 * tokens * HEADS * HEAD_DIM
    return [
        Case("add_rms_norm", lambda: (normal(tokens, WIDTH), normal(tokens, WIDTH), normal(WIDTH)),
             lambda x, r, w: ADD_RMS_NORM.direct("cuda")(x, r, w, 1e-5), torch_add_rms_norm, 2 * row + 2 * WIDTH,
             2 * row),
        Case("silu_mul", lambda: (normal(tokens, 2 * INNER),), SILU_MUL.direct("cuda"), torch_silu_mul, 2 * gate, gate),
        Case("rotary_write_kv", lambda: rotary_inputs(tokens), ROTARY_WRITE_KV.direct("cuda"), torch_rotary_write_kv,
             3 * head + 2 * 2 * tokens * HEAD_DIM + 8 * tokens, 3 * head),
    ]  # fmt: skip


def normal(*shape: int) -> Tensor:
    """Random elements."""
    return torch.randn(shape, device="cuda", dtype=DTYPE)


def rotary_inputs(tokens: int) -> tuple[Tensor, ...]:
    """qkv, cos, sin, both caches with room for all tokens, and shuffled slots."""
    caches = [normal(-(-tokens // BLOCK_SIZE), BLOCK_SIZE, HEADS, HEAD_DIM) for _ in "kv"]
    slots = torch.randperm(caches[0].shape[0] * BLOCK_SIZE, device="cuda")[:tokens]
    return normal(tokens, 3 * HEADS * HEAD_DIM), normal(tokens, HEAD_DIM), normal(tokens, HEAD_DIM), *caches, slots


def torch_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    """The same in torch's operations."""
    return F.rms_norm(residual.add_(x), (WIDTH,), weight, 1e-5)


def torch_silu_mul(gate_up: Tensor) -> Tensor:
    """The same in torch's operations."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def torch_rotary_write_kv(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor
) -> Tensor:
    """The same in torch's operations."""
    query, key, value = qkv.view(len(qkv), 3, HEADS, HEAD_DIM).unbind(1)

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]

    k_cache.view(-1, HEADS, HEAD_DIM).index_copy_(0, slots, turned(key))
    v_cache.view(-1, HEADS, HEAD_DIM).index_copy_(0, slots, value)
    return turned(query)


if __name__ == "__main__":
    sys.exit(main())
