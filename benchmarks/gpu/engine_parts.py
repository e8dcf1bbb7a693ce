"""What is measured of one booted engine."""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict, astuple
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.gpu.floors import ModelWork, Rates
from benchmarks.gpu.load import MIXED, OUTPUT_TOKENS, PREFILLS, SIDES, TEXT_TOKENS, milliseconds
from benchmarks.gpu.session import Sheet
from benchmarks.gpu.steady import profiled, show_kernels, steady_decode
from benchmarks.gpu.step_times import StepTimes, summary
from benchmarks.gpu.workload import Driver, Trace
from executor_service.engine.messages import BootProgress
from registry import MediaInfo

FIRST_TOKENS: Final = 6
STEADY_BATCHES: Final = (1, 64, 256)


class EngineParts:
    """Measures one geometry; `rates` are for the floors."""

    def __init__(self, model: Path, geometry: str, options: argparse.Namespace, rates: Rates) -> None:
        self._model, self._geometry, self._options, self._rates = model, geometry, options, rates
        self._work = ModelWork(model)
        self._side = SIDES[geometry]
        self._stages: dict[str, dict[str, Any]] = {}
        self._driver: Driver

    def measure(self, sheet: Sheet, config: dict[str, Any]) -> int:
        """Every part that is asked for; 1 if the engine did not boot."""
        if not sheet.measure("boot", lambda: self._boot(config)):
            return 1
        sheet.measure("warm_up", self._warm_up)
        parts = {
            "first_token": {"first_token": self._first_token},
            "decode": {f"decode_{batch}": partial(self._decode, batch) for batch in self._options.batches},
            "prefill": {"prefill": self._prefill},
            "steps": {f"steps_{batch}": partial(self._steps, batch) for batch in self._steady_batches()},
            "steady": {f"steady_{batch}": partial(self._steady, batch) for batch in self._steady_batches()},
            "mixed": {"mixed": self._mixed},
        }
        for part, measurements in parts.items():
            for name, measurement in measurements.items():
                if part in self._options.parts:
                    sheet.measure(name, measurement)
        return 0

    def _boot(self, config: dict[str, Any]) -> dict[str, Any]:
        self._driver = driver = Driver(self._model, self._note_stage, **config)
        ledger = driver.booted.report.ledger
        info = MediaInfo.image(self._side, self._side)
        self._image_tokens = driver.family.layout(info).length
        self._num_tiles = self._tiles(info)
        print(f"booted in {driver.boot_seconds:.1f} s, {ledger.num_blocks} blocks of {ledger.block_size}", flush=True)
        return {
            "seconds": driver.boot_seconds, "stages": self._stages, "config": _config(config), "ledger": asdict(ledger),
            "num_blocks": ledger.num_blocks, "image_tokens": self._image_tokens, "tiles": self._num_tiles,
            "prompt_tokens": self._prompt_tokens,
        }  # fmt: skip

    def _note_stage(self, progress: BootProgress) -> None:
        if progress.seconds is not None:
            print(f"{progress.stage}: {progress.seconds:.1f} s", flush=True)
            self._stages[progress.stage] = {
                "seconds": progress.seconds, "bytes": progress.num_bytes, "detail": progress.detail,
            }  # fmt: skip

    def _tiles(self, info: MediaInfo) -> int:
        """Tiles the tower sees of a picture: [3, H, W] is one, [n, 3, H, W] are n."""
        (spec,) = self._driver.family.layout(info).tensors.values()
        return int(spec.shape[0]) if len(spec.shape) == 4 else 1

    @property
    def _prompt_tokens(self) -> int:
        return self._image_tokens + TEXT_TOKENS

    def _count(self, count: int) -> int:
        """Of requests; few where figures mean nothing."""
        return min(count, 4) if self._options.quick else count

    def _tokens(self) -> int:
        return 8 if self._options.quick else OUTPUT_TOKENS

    def _warm_up(self) -> dict[str, Any]:
        """Libraries choose and load what they need for small and for full steps."""
        for count in (1, self._count(32)):
            self._driver.drive(self._driver.requests(count, self._side, 4, seed=99))
        return {}

    def _first_token(self) -> dict[str, Any]:
        """Milliseconds from a lone request's arrival to its first token; the first of them is left out."""
        seconds = []
        for seed in range(FIRST_TOKENS):
            (request,) = self._driver.requests(1, self._side, 1, seed=1000 + seed)
            seconds.append(self._driver.drive([request]).seconds)
        floors = self._work.prefill(1, self._prompt_tokens, self._num_tiles).floors(self._rates)
        median = 1000 * statistics.median(seconds[1:])
        print(f"first token {median:.1f} ms, {median / floors['sustained_ms']:.2f} x floor", flush=True)
        return {
            "median_ms": median, "all_ms": [1000 * value for value in seconds], **_against(floors, median),
            "profiled": self._profile(1),
        }  # fmt: skip

    def _decode(self, batch: int) -> dict[str, Any]:
        """Step time when all `batch` requests decode, and tokens per second from submission to the last token."""
        batch = self._count(batch)
        traces = [self._run(batch, self._tokens(), 100 * batch + n) for n in range(self._options.repeats)]
        intervals = [interval for trace in traces for interval in trace.decode_intervals(batch)]
        rates = [batch * self._tokens() / trace.seconds for trace in traces]
        ledger = self._driver.booted.report.ledger
        needed = batch * -(-(self._prompt_tokens + self._tokens()) // ledger.block_size)
        figures: dict[str, Any] = {
            "batch": batch, "fits": needed <= ledger.num_blocks, "step_ms": milliseconds(intervals),
            "tokens_per_second": statistics.median(rates), "tokens_per_second_all": rates,
            "seconds": traces[-1].seconds,
        }  # fmt: skip
        if intervals:
            context = self._prompt_tokens + statistics.mean(mean_tokens(trace, batch) for trace in traces)
            floors = self._work.decode(batch, context).floors(self._rates)
            figures |= {"mean_context": context, **_against(floors, figures["step_ms"]["median"])}
        print(
            f"batch {batch}: step {figures['step_ms'].get('median', float('nan')):.2f} ms, "
            f"{figures.get('floor_over_measured', float('nan')):.1%} of floor, "
            f"{figures['tokens_per_second']:.0f} tokens/s", flush=True,
        )  # fmt: skip
        return figures

    def _run(self, count: int, max_tokens: int, seed: int) -> Trace:
        return self._driver.drive(self._driver.requests(count, self._side, max_tokens, seed=seed))

    def _prefill(self) -> dict[str, Any]:
        """Pictures per second, many requests with one token each."""
        count = self._count(PREFILLS.get(self._geometry, 16))
        seconds = [self._run(count, 1, 2000 + n).seconds for n in range(self._options.repeats)]
        floors = self._work.prefill(count, self._prompt_tokens, self._num_tiles).floors(self._rates)
        rate = count / statistics.median(seconds)
        against = _against(floors, 1000 * count / rate)
        print(f"prefill {rate:.1f} images/s, {against['floor_over_measured']:.1%} of floor", flush=True)
        return {
            "images": count, "images_per_second": rate, "seconds_all": seconds, **against,
            "floor_images_per_second": 1000 * count / floors["sustained_ms"], "profiled_per_image": self._profile(64),
        }  # fmt: skip

    def _profile(self, count: int) -> dict[str, Any]:
        """The kernels of a prefill of `count` requests, per request."""
        if not self._driver.is_cuda:
            return {}
        requests = self._driver.requests(self._count(count), self._side, 1, seed=count)
        profile = profiled(lambda: self._driver.drive(requests), len(requests))
        print(
            f"prefill of {len(requests)}, profiled: {profile.get('num_kernels', 0):.0f} kernels each, busy "
            f"{profile.get('busy_ms', 0):.2f} ms, idle {profile.get('idle_share', 0):.1%}", flush=True,
        )  # fmt: skip
        show_kernels(profile)
        return profile

    def _steps(self, batch: int) -> dict[str, Any]:
        """What the steps of an end-to-end run computed, and how long each took; on a GPU."""
        if not self._driver.is_cuda:
            return {}
        requests = self._driver.requests(self._count(batch), self._side, self._tokens(), seed=batch)
        with StepTimes(self._driver.engine.runner) as times:
            seconds = self._driver.drive(requests).seconds
        sums = summary(times.steps)
        for kind, one in sums.items():
            told = ", ".join(f"{key} {value:.0f}" for key, value in one.items())
            print(f"steps of {batch}, {kind}: {told}", flush=True)
        return {"batch": batch, "seconds": seconds, **sums, "each": [astuple(step) for step in times.steps]}

    def _steady_batches(self) -> list[int]:
        if self._options.quick:
            return [2]
        return [batch for batch in STEADY_BATCHES if batch <= self._options.max_num_seqs and self._fits(batch)]

    def _fits(self, batch: int) -> bool:
        ledger = self._driver.booted.report.ledger
        return batch * (self._prompt_tokens + OUTPUT_TOKENS) <= ledger.num_blocks * ledger.block_size

    def _steady(self, batch: int) -> dict[str, Any]:
        figures = steady_decode(self._driver, batch, self._side)
        profile = figures["profiled"]
        print(
            f"steady {batch}: step {figures['step_ms']:.2f} ms, host {figures['host_ms']:.2f} ms, device busy "
            f"{profile.get('busy_ms', float('nan')):.2f} ms when profiled, idle {profile.get('idle_share', 0.0):.1%}; "
            f"its graph alone {figures.get('graph_alone_ms', float('nan')):.2f} ms, so idle at most "
            f"{figures.get('idle_share_at_most', float('nan')):.1%}",
            flush=True,
        )
        show_kernels(profile)
        return figures

    def _mixed(self) -> dict[str, Any]:
        """Requests that keep arriving while others decode."""
        count, rate = MIXED.get(self._geometry, (8, 50.0))
        return mixed_load(self._driver, self._count(count), rate, self._side, self._tokens())


def mixed_load(driver: Driver, count: int, rate: float, side: int, max_tokens: int) -> dict[str, Any]:
    """Milliseconds between a request's tokens, and to its first, while `rate` requests arrive in a second."""
    arrivals = [number / rate for number in range(count)]
    requests = driver.requests(count, side, max_tokens, seed=3000)
    trace = driver.drive(requests, arrivals=arrivals)
    firsts = trace.first_tokens()
    waits = [firsts[r.request_id] - trace.began - at for r, at in zip(requests, arrivals, strict=True)]
    figures = {
        "requests": count, "requests_per_second": rate, "token_interval_ms": milliseconds(trace.token_intervals()),
        "first_token_ms": milliseconds(waits), "tokens_per_second": count * max_tokens / trace.seconds,
    }  # fmt: skip
    interval = figures["token_interval_ms"]
    print(f"mixed load: between tokens {interval['median']:.1f} ms, p99 {interval['p99']:.1f} ms", flush=True)
    return figures


def mean_tokens(trace: Trace, batch: int) -> float:
    """Output tokens that a request has on average, over the steps of `decode_intervals`."""
    counts = [
        statistics.mean(step.num_tokens.values())
        for step in trace.steps
        if len(step.num_tokens) == batch and min(step.num_tokens.values()) > 2
    ]
    return statistics.mean(counts) if counts else 0.0


def _against(floors: dict[str, float], measured_ms: float) -> dict[str, float]:
    """Floors, and the share of the measured time that the sustained one is."""
    return {
        "floor_short_ms": floors["short_ms"], "floor_sustained_ms": floors["sustained_ms"],
        "floor_over_measured": floors["sustained_ms"] / measured_ms,
    }  # fmt: skip


def _config(config: dict[str, Any]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in config.items()}
