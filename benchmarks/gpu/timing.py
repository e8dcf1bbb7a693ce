"""Timing of GPU work by events around graph replays, on inputs too many or too large to stay in the L2 cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from executor_service.kernels.cuda.module import INT, LONG, POINTER, kernel, num_multiprocessors

CEILING_BYTES = 4 << 30
PASSES = 7
MAX_SETS = 1000


def rotating_copies(make: Callable[[], Sequence[Tensor]], num_bytes: int) -> list[Sequence[Tensor]]:
    """As many sets of inputs as fill the L2 cache four times over, at least two; at most `MAX_SETS`."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return [make() for _ in range(min(max(2, -(-4 * cache // max(num_bytes, 1))), MAX_SETS))]


def seconds_each(calls: Sequence[Callable[[], object]], min_seconds: float = 0.02) -> list[float]:
    """Seconds of one call, `PASSES` times: replays of a graph of all calls, repeated for at least `min_seconds`.

    Results stay until the end, so that each call writes memory of its own.
    """
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph, results = torch.cuda.CUDAGraph(), list[object]()
    with torch.cuda.graph(graph):
        for call in calls:
            results.append(call())
    once = _replay(graph, 1)
    repeats = max(1, round(min_seconds / max(once, 1e-6)))
    return [_replay(graph, repeats) / repeats / len(calls) for _ in range(PASSES)]


def _replay(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second that our own read and write kernels reach on random data, best of several grids."""

    read: float
    write: float

    def floor(self, bytes_read: float, bytes_written: float) -> float:
        """Seconds that no kernel moving so many bytes beats."""
        return bytes_read / self.read + bytes_written / self.write


def measure_ceilings() -> Ceilings:
    """Read and write rates in this very run."""
    data = torch.randint(-(1 << 31), 1 << 31, (CEILING_BYTES // 8,), dtype=torch.int64, device="cuda")
    count, processors = CEILING_BYTES // 16, num_multiprocessors(0)
    read = kernel("streams", "read_stream", (POINTER, POINTER, LONG))
    write = kernel("streams", "write_stream", (POINTER, INT, LONG))
    rates: dict[str, list[float]] = {"read": [], "write": []}
    for blocks_each in (2, 4, 8):
        blocks = blocks_each * processors
        sums = torch.zeros(blocks, dtype=torch.int32, device="cuda")
        for name, launch in (
            ("read", lambda b=blocks, s=sums: read((b,), 512, data, s, count)),
            ("write", lambda b=blocks: write((b,), 512, data, 7, count)),
        ):
            rates[name].append(CEILING_BYTES / statistics.median(seconds_each([launch])))
    return Ceilings(max(rates["read"]), max(rates["write"]))
