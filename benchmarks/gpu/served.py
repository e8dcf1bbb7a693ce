"""Both services on a GPU with many clients at once, against the engine in a process of its own, in one run.

Arms, each with 64 and 256 requests at once, each request with a picture of its own, 64 text tokens, 128 tokens out:
`in process` steps the engine itself on ready tensors; `stand-ins` are ready tensors on one shared `Execute` stream;
`Generate` are JPEG files through one preprocess service, and through several.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.gpu.load import SIDES, TEXT_TOKENS, max_model_len
from benchmarks.gpu.session import Sheet, exit_when_told, run_module, sheets
from benchmarks.processes import EXECUTOR, PREPROCESS, child_of, processor_seconds, started
from benchmarks.results import make_parser, write_result

if TYPE_CHECKING:
    from benchmarks.gpu.clients import Clients

GEOMETRIES: Final = ("llava-1.5-7b",)
IN_PROCESS, STAND_INS, ONE, SEVERAL = "in process", "stand-ins", "Generate", "Generate, several preprocess services"
TARGET_SPLIT: Final = 0.05
LIMIT: Final = 90.0
"""Seconds of one measurement at the most."""


def main(argv: list[str] | None = None) -> int:
    """Measure all arms; or, with `--sheet`, be the process of one of them."""
    options = parse(argv)
    exit_when_told()
    if options.sheet:
        sheet = Sheet(options.sheet)
        (in_process if options.process == "engine" else services)(sheet, options)
        return 0
    load_before = os.getloadavg()[0]
    figures: dict[str, Any] = {}
    with sheets(options.output) as folder:
        for geometry in options.geometries:
            make_checkpoint(geometry)
            figures[geometry] = {}
            if options.ours:
                figures[geometry]["engine"] = read_engine(options.ours, geometry)
            for process in ("services",) if options.ours else ("engine", "services"):
                print(f"\n=== {geometry}: {process}", flush=True)
                figures[geometry][process] = start(process, geometry, folder, options)
                figures[geometry]["ratios"] = ratios(figures[geometry])
                write_result("gpu_served", figures, options, load_before)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Flags of both kinds of process."""
    parser = make_parser("gpu.served", __doc__)
    parser.add_argument("--geometries", type=lambda text: tuple(text.split(",")), default=GEOMETRIES)
    parser.add_argument("--concurrency", type=lambda text: tuple(map(int, text.split(","))), default=(64, 256))
    parser.add_argument("--repeats", type=int, default=3, help="of every arm, interleaved (default 3)")
    parser.add_argument("--tokens", type=int, default=128, help="out, of every request (default 128)")
    parser.add_argument("--clients", type=int, default=4, help="client processes (default 4)")
    parser.add_argument("--preprocess", type=int, default=4, help="preprocess services of the arm with several")
    parser.add_argument("--ours", type=Path, help="gpu_engine.json of this session, instead of the arm in process")
    parser.add_argument("--device", default="cuda", help="cpu to try it out with a tiny geometry")
    parser.add_argument("--seconds", type=float, default=240, help="at most, of each of the two processes")
    parser.add_argument("--sheet", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--process", default="services", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.quick:
        options.concurrency, options.repeats, options.tokens = (2,), 1, 4
    return options


def make_checkpoint(geometry: str) -> None:
    """In a process of its own: this one must not have a part of the GPU."""
    code = f"from benchmarks.gpu.models import ensure_checkpoint; ensure_checkpoint({geometry!r})"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def start(process: str, geometry: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One process's figures."""
    flags = [
        "--process", process, "--geometries", geometry, "--concurrency", ",".join(map(str, options.concurrency)),
        "--repeats", str(options.repeats), "--tokens", str(options.tokens), "--clients", str(options.clients),
        "--preprocess", str(options.preprocess), "--device", options.device,
    ]  # fmt: skip
    return run_module("benchmarks.gpu.served", *flags, sheet=folder / f"{process}.json", limit=options.seconds)


def read_engine(path: Path, geometry: str) -> dict[str, Any]:
    """The engine's own tokens per second as its benchmark has them, for the same numbers of requests at once."""
    parts = json.loads(path.read_text("utf-8"))["figures"].get(geometry, {}).get("main", {})
    return {
        f"{IN_PROCESS}, {part['batch']}": {"tokens_per_second": part["tokens_per_second"], "from": path.name}
        for name, part in parts.items() if name.startswith("decode_") and "tokens_per_second" in part
    }  # fmt: skip


def in_process(sheet: Sheet, options: argparse.Namespace) -> None:
    """The engine's own tokens per second, with the services' settings."""
    from benchmarks.gpu.models import ensure_checkpoint
    from benchmarks.gpu.workload import Driver

    (geometry,) = options.geometries
    driver = Driver(
        ensure_checkpoint(geometry), device=options.device, prefix_caching=True,
        max_model_len=max_model_len(geometry),
    )  # fmt: skip
    side = SIDES[geometry]
    driver.drive(driver.requests(min(options.concurrency), side, 4, seed=1))
    for count in options.concurrency:

        def measure(count: int = count) -> dict[str, Any]:
            rates = []
            for seed in range(options.repeats):
                trace = driver.drive(driver.requests(count, side, options.tokens, seed=10 + seed), LIMIT)
                rates.append(count * options.tokens / trace.seconds)
            return _rates(f"{IN_PROCESS}, {count}", rates)

        sheet.measure(f"{IN_PROCESS}, {count}", measure)


def services(sheet: Sheet, options: argparse.Namespace) -> None:
    """Executor and preprocess services once, the arms in turn."""
    from benchmarks.gpu.clients import Clients
    from benchmarks.gpu.models import checkpoint_folder

    (geometry,) = options.geometries
    model = checkpoint_folder(geometry)
    with Clients(max(options.clients, options.preprocess)) as clients, running(model, geometry, options) as all_of_it:
        executor, preprocess, pids = all_of_it
        arms = {STAND_INS: [executor], ONE: preprocess[:1], SEVERAL: preprocess}
        if options.preprocess < 2:
            del arms[SEVERAL]
        _run_all(arms, model, geometry, min(*options.concurrency, 16), 0, options, clients)
        for count in options.concurrency:
            runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
            for seed in range(options.repeats):
                for arm, figures in _run_all(arms, model, geometry, count, 100 + seed, options, clients, pids).items():
                    runs[arm].append(figures)
            for arm, values in runs.items():
                if values:
                    sheet.note(f"{arm}, {count}", _summary(f"{arm}, {count}", values))


@contextlib.contextmanager
def running(model: Path, geometry: str, options: argparse.Namespace) -> Iterator[tuple[str, list[str], dict[str, int]]]:
    """Addresses of the executor and of the preprocess services, and the processes by name."""
    flags = ("--model", str(model), "--device", options.device, "--max-model-len",
             str(max_model_len(geometry)))  # fmt: skip
    with contextlib.ExitStack() as stack:
        executor = stack.enter_context(started(EXECUTOR, *flags))
        pids = {"front": executor.pid, "engine": child_of(executor.pid)}
        count = max(options.preprocess, 1)
        starts = [
            started(PREPROCESS, "--model", str(model), "--executor", executor.address, "--max-pending-requests", "1024")
            for _ in range(count)
        ]
        with ThreadPoolExecutor(count) as pool:
            services = list(pool.map(stack.enter_context, starts))
        pids |= {f"preprocess {number}": service.pid for number, service in enumerate(services)}
        addresses = [service.address for service in services]
        yield executor.address, addresses, pids


def _run_all(
    arms: dict[str, list[str]], model: Path, geometry: str, count: int, seed: int, options: argparse.Namespace,
    clients: Clients, pids: dict[str, int] | None = None,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Every arm once; one that fails is left out."""
    figures = {}
    for number, (arm, addresses) in enumerate(arms.items()):
        try:
            figures[arm] = _run(
                arm, addresses, model, geometry, count, seed + 1000 * number, options, clients, pids or {}
            )
        except Exception:  # the other arms' figures are still of use
            traceback.print_exc()
    return figures


def _run(
    arm: str, addresses: list[str], model: Path, geometry: str, count: int, seed: int, options: argparse.Namespace,
    clients: Clients, pids: dict[str, int],
) -> dict[str, float]:  # fmt: skip
    """`count` requests at once, spread over client processes and addresses."""
    from benchmarks.gpu.clients import Job

    kind = "stand-ins" if arm == STAND_INS else "generate"
    # One shared stream is one process's.
    number = 1 if kind == "stand-ins" else max(min(options.clients, count), len(addresses[:count]))
    counts = [count // number + (index < count % number) for index in range(number)]
    jobs = [
        Job(kind, addresses[index % len(addresses)], model, share, SIDES[geometry], TEXT_TOKENS, options.tokens,
            10_000 * seed + index)
        for index, share in enumerate(counts) if share
    ]  # fmt: skip
    before = {name: processor_seconds(pid) for name, pid in pids.items()}
    outcomes = clients.run(jobs, LIMIT)
    used = {f"{name}_seconds": processor_seconds(pid) - before[name] for name, pid in pids.items()}
    began, ended = min(one.began for one in outcomes), max(one.ended for one in outcomes)
    firsts = [first - began for one in outcomes for first in one.first_tokens]
    seconds = ended - began
    tokens = sum(one.num_tokens for one in outcomes)
    return {
        "tokens_per_second": tokens / seconds, "seconds": seconds, "first_token_ms": 1000 * statistics.median(firsts),
        **used,
    }  # fmt: skip


def _summary(name: str, runs: list[dict[str, float]]) -> dict[str, Any]:
    rates = [run["tokens_per_second"] for run in runs]
    medians = {key: statistics.median(run[key] for run in runs) for key in runs[0] if key != "tokens_per_second"}
    return {**_rates(name, rates), **medians}


def _rates(name: str, rates: list[float]) -> dict[str, Any]:
    print(f"{name:<45} {statistics.median(rates):8.0f} tokens/s", flush=True)
    return {"tokens_per_second": statistics.median(rates), "all": rates}


def ratios(figures: dict[str, Any]) -> dict[str, Any]:
    """What the split costs: each arm's share of the engine's own rate that is lost."""
    engine, served = figures.get("engine", {}), figures.get("services", {})
    lost = {}
    for name, arm in served.items():
        count = name.rpartition(", ")[2]
        alone = engine.get(f"{IN_PROCESS}, {count}", {})
        if isinstance(arm, dict) and "tokens_per_second" in arm and "tokens_per_second" in alone:
            lost[name] = 1 - arm["tokens_per_second"] / alone["tokens_per_second"]
    for name, share in lost.items():
        print(f"{name:<45} loses {share:6.1%} of the engine's own rate", flush=True)
    return {"lost": lost, "target": TARGET_SPLIT}


if __name__ == "__main__":
    sys.exit(main())
