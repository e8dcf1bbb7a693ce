"""A steady decode run: what the host needs for a step, what the device needs, and how long the device is idle."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any, Final

import torch

from benchmarks.gpu.workload import Driver

WARM_STEPS: Final = 8
STEPS: Final = 40
NUM_NAMES: Final = 12
"""Kernels listed in the result, the longest first."""


def steady_decode(driver: Driver, batch: int, side: int) -> dict[str, Any]:
    """Two windows of steps in which `batch` requests decode and nothing else happens.

    The first is timed as it is; waiting for the device is what the host spends in `synchronize`. The second is
    profiled, which makes kernels slower: its idle share is where no kernel runs, between the window's first and last.
    Then the step's graph is replayed with nothing else to do: what a step takes beyond that is copies, the sampler and
    idleness, so it bounds the idle share without a profiler.
    """
    requests = driver.requests(batch, side, seed=7)
    steps = driver.decoding(requests)
    for _ in range(WARM_STEPS):
        next(steps)
    with Waiting() as waiting:
        began = time.perf_counter()
        for _ in range(STEPS):
            next(steps)
        seconds = time.perf_counter() - began
    figures = {
        "batch": batch,
        "step_ms": 1000 * seconds / STEPS,
        "host_ms": 1000 * (seconds - waiting.seconds) / STEPS,
        "waiting_ms": 1000 * waiting.seconds / STEPS,
        "profiled": profiled(lambda: list(itertools.islice(steps, STEPS)), STEPS) if driver.is_cuda else {},
    }
    if alone := graph_alone(driver, batch):
        figures |= {"graph_alone_ms": 1000 * alone, "idle_share_at_most": 1 - alone / (seconds / STEPS)}
    driver.abandon(requests)
    return figures


def graph_alone(driver: Driver, batch: int) -> float | None:
    """Seconds of one replay of the batch's decode graph among many, its inputs those of the last step."""
    graphs = driver.engine.runner.graphs if driver.is_cuda else None
    size = graphs.size_for(batch) if graphs is not None else None
    if graphs is None or size is None:
        return None
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graphs.replay(size)
    begin.record()
    for _ in range(STEPS):
        graphs.replay(size)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / STEPS


class Waiting:
    """Counts the seconds that this process spends in torch's calls that wait for the device, while it is entered."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._originals = [(owner, owner.synchronize) for owner in (torch.cuda.Event, torch.cuda.Stream, torch.cuda)]

    def __enter__(self) -> Waiting:
        for owner, original in self._originals:
            setattr(owner, "synchronize", self._timed(original))  # noqa: B010 - it may be a class or a module
        return self

    def __exit__(self, *_: object) -> None:
        for owner, original in self._originals:
            setattr(owner, "synchronize", original)  # noqa: B010

    def _timed(self, original: Any) -> Any:
        def synchronize(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return original(*arguments)
            finally:
                self.seconds += time.perf_counter() - began

        return synchronize


def profiled(call: Callable[[], object], count: int) -> dict[str, Any]:
    """Kernels of a call that does `count` things: how long any of them runs, how long none does, the longest by name.

    All per thing, but for the idle share, which is of the time between the first kernel and the last.
    """
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events = profiler.profiler.kineto_results.events()
    device = torch.autograd.DeviceType.CUDA
    kernels = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns(), event.name())
        for event in events
        if event.device_type() == device and not event.name().startswith(("Memcpy", "Memset"))
    )
    if not kernels:
        return {"error": "the profiler saw no kernel"}
    span, busy = kernels[-1][1] - kernels[0][0], _union(kernels)
    return {
        "num_kernels": len(kernels) / count,
        "busy_ms": busy / 1e6 / count,
        "span_ms": span / 1e6 / count,
        "idle_share": 1 - busy / span,
        "kernels": _by_name(kernels, count),
    }


def show_kernels(profile: dict[str, Any]) -> None:
    """A line for each of the longest."""
    for name, kernel in profile.get("kernels", {}).items():
        print(f"    {1000 * kernel['ms']:8.0f} µs in {kernel['launches']:6.1f} launches  {name[:90]}", flush=True)


def _union(intervals: list[tuple[int, int, str]]) -> int:
    """Nanoseconds in which at least one of the sorted intervals runs."""
    total, reached = 0, intervals[0][0]
    for begin, end, _ in intervals:
        total += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def _by_name(kernels: list[tuple[int, int, str]], count: int) -> dict[str, dict[str, float]]:
    """Launches and milliseconds per thing of the kernels that take longest."""
    sums: dict[str, list[int]] = {}
    for begin, end, name in kernels:
        entry = sums.setdefault(name[:120], [0, 0])
        entry[0] += 1
        entry[1] += end - begin
    longest = sorted(sums.items(), key=lambda item: -item[1][1])[:NUM_NAMES]
    return {name: {"launches": number / count, "ms": ns / 1e6 / count} for name, (number, ns) in longest}
