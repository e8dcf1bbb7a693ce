"""The measured processes of `benchmarks.gpu.served`: the engine itself, and both services with their clients.

Each has so many seconds, boot included. Repeats go round and round over numbers of requests and arms; a run begins only
where there is time for it, so that what is cut are repeats and not arms.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.gpu.clients import Clients, Job
from benchmarks.gpu.load import SIDES, TEXT_TOKENS, max_model_len
from benchmarks.gpu.session import Sheet
from benchmarks.processes import EXECUTOR, PREPROCESS, child_of, processor_seconds, started
from diptych.cli.children import reserved_port

IN_PROCESS, STAND_INS, ONE, SEVERAL = "in process", "stand-ins", "Generate", "Generate, several preprocess services"
LIMIT: Final = 60.0
"""Seconds of one run at the most."""
MARGIN: Final = 1.3
"""A run may take so much longer than the arm's longest before it."""
LOOPBACK: Final = "127.0.0.1"
Run = Callable[[int], dict[str, float]]
"""One run with a seed of its own."""


class Rounds:
    """Arms by name, run in turn and noted after every run, until all have had their repeats or time is up."""

    def __init__(self, sheet: Sheet, until: float, repeats: int) -> None:
        self._sheet, self._until, self._repeats = sheet, until, repeats
        self._runs: dict[str, list[dict[str, float]]] = {}
        self._longest: dict[str, float] = {}

    def run(self, arms: dict[str, Run]) -> None:
        """Every arm once, then again; one that fails is left out of that round alone."""
        for number in range(self._repeats):
            for index, (name, arm) in enumerate(arms.items()):
                if self._has_time(name):
                    self._once(name, arm, 100 * number + index)

    def _has_time(self, name: str) -> bool:
        return time.monotonic() + MARGIN * self._longest.get(name, 0.0) < self._until

    def _once(self, name: str, arm: Run, seed: int) -> None:
        began = time.monotonic()
        try:
            self._runs.setdefault(name, []).append(arm(seed))
        except Exception as error:  # the other arms' figures are still of use
            traceback.print_exc()
            self._sheet.note(f"{name}, failed", f"{type(error).__name__}: {error}"[:500])
        self._longest[name] = max(self._longest.get(name, 0.0), time.monotonic() - began)
        if runs := self._runs.get(name):
            self._sheet.note(name, _summary(runs))
            print(f"{name:<45} {self._sheet.figures[name]['tokens_per_second']:8.0f} tokens/s", flush=True)


def _summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return {**medians, "all": [run["tokens_per_second"] for run in runs]}


def in_process(sheet: Sheet, options: argparse.Namespace) -> None:
    """The engine's own tokens per second, with the services' settings."""
    until = time.monotonic() + options.seconds
    from benchmarks.gpu.models import ensure_checkpoint
    from benchmarks.gpu.workload import Driver

    (geometry,) = options.geometries
    driver = Driver(
        ensure_checkpoint(geometry), device=options.device, prefix_caching=True,
        max_model_len=max_model_len(geometry),
    )  # fmt: skip
    side = SIDES[geometry]
    driver.drive(driver.requests(min(options.concurrency), side, 4, seed=1))

    def run(count: int, seed: int) -> dict[str, float]:
        before = driver.engine.load.num_preemptions
        trace = driver.drive(driver.requests(count, side, options.tokens, seed=10 + seed), LIMIT)
        firsts = [first - trace.began for first in trace.first_tokens().values()]
        return {
            "tokens_per_second": count * options.tokens / trace.seconds, "seconds": trace.seconds,
            "first_token_ms": 1000 * statistics.median(firsts), "last_first_token_ms": 1000 * max(firsts),
            "num_steps": len(trace.steps), "num_preemptions": driver.engine.load.num_preemptions - before,
        }  # fmt: skip

    sheet.note("num_blocks", driver.booted.report.ledger.num_blocks)
    Rounds(sheet, until, options.repeats).run(
        {f"{IN_PROCESS}, {count}": partial(run, count) for count in options.concurrency}
    )


def services(sheet: Sheet, options: argparse.Namespace) -> None:
    """Executor and preprocess services once, the arms in turn."""
    until = time.monotonic() + options.seconds
    from benchmarks.gpu.models import checkpoint_folder

    (geometry,) = options.geometries
    model = checkpoint_folder(geometry)
    with Clients(max(options.clients, options.preprocess)) as clients, running(model, geometry, options) as all_of_it:
        executor, preprocess, pids = all_of_it
        load = Load(model, geometry, options, clients, pids)
        arms = {STAND_INS: [executor], ONE: preprocess[:1], SEVERAL: preprocess}
        if options.preprocess < 2:
            del arms[SEVERAL]
        for number, (arm, addresses) in enumerate(arms.items()):  # whatever is done once only is done then
            load.run(arm, addresses, min(*options.concurrency, 16), 90_000 + number)
        Rounds(sheet, until, options.repeats).run(
            {
                f"{arm}, {count}": partial(load.run, arm, addresses, count)
                for count in options.concurrency
                for arm, addresses in arms.items()
            }
        )


@contextlib.contextmanager
def running(model: Path, geometry: str, options: argparse.Namespace) -> Iterator[tuple[str, list[str], dict[str, int]]]:
    """Addresses of the executor and of the preprocess services, and the processes by name. All boot at once."""
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(reserved_port(0, LOOPBACK))
        flags = ("--model", str(model), "--device", options.device, "--max-model-len", str(max_model_len(geometry)))
        more = ("--model", str(model), "--executor", f"{LOOPBACK}:{port}", "--max-pending-requests", "1024")
        starts = [started(EXECUTOR, *flags, "--port", str(port))]
        starts += [started(PREPROCESS, *more) for _ in range(max(options.preprocess, 1))]
        with ThreadPoolExecutor(len(starts)) as pool:
            executor, *preprocess = pool.map(stack.enter_context, starts)
        pids = {"front": executor.pid, "engine": child_of(executor.pid)}
        pids |= {f"preprocess {number}": service.pid for number, service in enumerate(preprocess)}
        yield executor.address, [service.address for service in preprocess], pids


class Load:
    """Requests at once, spread over client processes and addresses."""

    def __init__(
        self, model: Path, geometry: str, options: argparse.Namespace, clients: Clients, pids: dict[str, int]
    ) -> None:
        self._model, self._geometry, self._options = model, geometry, options
        self._clients, self._pids = clients, pids

    def run(self, arm: str, addresses: list[str], count: int, seed: int) -> dict[str, float]:
        """`count` requests, and the processor time that every service has taken for them."""
        before = {name: processor_seconds(pid) for name, pid in self._pids.items()}
        outcomes = self._clients.run(self._jobs(arm, addresses, count, seed), LIMIT)
        used = {f"{name}_seconds": processor_seconds(pid) - before[name] for name, pid in self._pids.items()}
        began, ended = min(one.began for one in outcomes), max(one.ended for one in outcomes)
        firsts = [first - began for one in outcomes for first in one.first_tokens]
        tokens = sum(one.num_tokens for one in outcomes)
        return {
            "tokens_per_second": tokens / (ended - began), "seconds": ended - began,
            "first_token_ms": 1000 * statistics.median(firsts), "first_first_token_ms": 1000 * min(firsts),
            "last_first_token_ms": 1000 * max(firsts), **used,
        }  # fmt: skip

    def _jobs(self, arm: str, addresses: list[str], count: int, seed: int) -> list[Job]:
        """One shared stream is one process's; calls of `Generate` are spread."""
        kind = "stand-ins" if arm == STAND_INS else "generate"
        number = 1 if kind == "stand-ins" else max(min(self._options.clients, count), len(addresses[:count]))
        shares = [count // number + (index < count % number) for index in range(number)]
        return [
            Job(kind, addresses[index % len(addresses)], self._model, share, SIDES[self._geometry], TEXT_TOKENS,
                self._options.tokens, 10_000 * seed + 100 * count + index)
            for index, share in enumerate(shares) if share
        ]  # fmt: skip
