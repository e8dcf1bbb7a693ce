"""Both services on a GPU with many clients at once, against the engine in a process of its own, in one run.

Arms, each with 64 and 256 requests at once, each request with a picture of its own, 64 text tokens, 128 tokens out:
`in process` steps the engine itself on ready tensors; `stand-ins` are ready tensors on one shared `Execute` stream;
`Generate` are JPEG files through one preprocess service, and through several. `--peers` adds what vLLM makes of such
requests, from the picture on. The result is written after every run; `partial` says that more was to come.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.gpu.options import parse_for_gpu
from benchmarks.gpu.served_arms import IN_PROCESS, ONE, SEVERAL, STAND_INS, in_process, services
from benchmarks.gpu.session import Sheet, exit_when_told, run_module, sheets
from benchmarks.results import make_parser, write_result

GEOMETRIES: Final = ("llava-1.5-7b",)
TARGET_SPLIT: Final = 0.05
TARGET_VLLM: Final = 1.1
ENGINE_SHARE: Final = 0.35
"""Of the time, for the engine in a process of its own."""
GRACE: Final = 20.0
"""Seconds beyond its time after which a process is ended: a run that has begun may end."""


def main(argv: list[str] | None = None) -> int:
    """Measure all arms; or, with `--sheet`, be the process of one of them."""
    options = parse(argv)
    exit_when_told()
    if options.sheet:
        sheet = Sheet(options.sheet)
        (in_process if options.process == "engine" else services)(sheet, options)
        return 0
    figures: dict[str, Any] = {}
    with sheets(options.output) as folder:
        for geometry in options.geometries:
            make_checkpoint(geometry)
            figures[geometry] = {"vllm": read_vllm(options.peers, geometry)}
            measure(geometry, figures, folder, options)
            print_table(geometry, figures[geometry], options.concurrency)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Flags of both kinds of process."""
    parser = make_parser("gpu.served", __doc__)
    parser.add_argument("--geometries", type=lambda text: tuple(text.split(",")), default=GEOMETRIES)
    parser.add_argument("--concurrency", type=lambda text: tuple(map(int, text.split(","))), default=(64, 256))
    parser.add_argument("--repeats", type=int, default=3, help="of every arm, if there is time (default 3)")
    parser.add_argument("--tokens", type=int, default=128, help="out, of every request (default 128)")
    parser.add_argument("--clients", type=int, default=4, help="client processes (default 4)")
    parser.add_argument("--preprocess", type=int, default=4, help="preprocess services of the arm with several")
    parser.add_argument("--ours", type=Path, help="gpu_engine.json of this session, instead of the arm in process")
    parser.add_argument("--peers", type=Path, help="gpu_peers.json of this session, for vLLM's rates")
    parser.add_argument("--device", default="cuda", help="cpu to try it out with a tiny geometry")
    parser.add_argument("--seconds", type=float, default=120, help="of a geometry, boots included (default 120)")
    parser.add_argument("--sheet", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--process", default="services", help=argparse.SUPPRESS)
    options = parse_for_gpu(parser, argv)
    if options.quick:
        options.concurrency, options.repeats, options.tokens = (2,), 1, 4
    return options


def make_checkpoint(geometry: str) -> None:
    """In a process of its own: this one must not have a part of the GPU."""
    code = f"from benchmarks.gpu.models import ensure_checkpoint; ensure_checkpoint({geometry!r})"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def measure(geometry: str, figures: dict[str, Any], folder: Path, options: argparse.Namespace) -> None:
    """Both processes' figures, on disk after every run."""
    load_before, until = os.getloadavg()[0], time.monotonic() + options.seconds
    own = figures[geometry]

    def note(process: str, some: dict[str, Any], *, is_partial: bool) -> None:
        own[process] = some
        own["ratios"] = ratios(own)
        own["partial"] = is_partial
        write_result("gpu_served", figures, options, load_before)

    if options.ours:
        note("engine", read_engine(options.ours, geometry), is_partial=True)
    for process in ("services",) if options.ours else ("engine", "services"):
        print(f"\n=== {geometry}: {process}", flush=True)
        seconds = (ENGINE_SHARE if process == "engine" else 1.0) * (until - time.monotonic())
        some = run_module(
            "benchmarks.gpu.served", *_flags(process, geometry, seconds, options), sheet=folder / f"{process}.json",
            limit=seconds + GRACE, on_change=partial(note, process, is_partial=True),
        )  # fmt: skip
        note(process, some, is_partial=process == "engine" or "error" in some)


def _flags(process: str, geometry: str, seconds: float, options: argparse.Namespace) -> list[str]:
    return [
        "--process", process, "--geometries", geometry, "--concurrency", ",".join(map(str, options.concurrency)),
        "--repeats", str(options.repeats), "--tokens", str(options.tokens), "--clients", str(options.clients),
        "--preprocess", str(options.preprocess), "--device", options.device, "--seconds", str(seconds),
    ]  # fmt: skip


def read_engine(path: Path, geometry: str) -> dict[str, Any]:
    """The engine's own tokens per second as its benchmark has them, for the same numbers of requests at once."""
    parts = json.loads(path.read_text("utf-8"))["figures"].get(geometry, {}).get("main", {})
    return {
        f"{IN_PROCESS}, {part['batch']}": {"tokens_per_second": part["tokens_per_second"], "from": path.name}
        for name, part in parts.items() if name.startswith("decode_") and "tokens_per_second" in part
    }  # fmt: skip


def read_vllm(path: Path | None, geometry: str) -> dict[str, float]:
    """Number of requests at once -> vLLM's tokens per second from the picture on; empty if there are none."""
    if path is None or not path.is_file():
        return {}
    parts = json.loads(path.read_text("utf-8"))["figures"].get(geometry, {}).get("vllm", {})
    return {
        str(part["batch"]): part["from_picture_tokens_per_second"]
        for part in parts.values() if isinstance(part, dict) and "from_picture_tokens_per_second" in part
    }  # fmt: skip


def ratios(figures: dict[str, Any]) -> dict[str, Any]:
    """What the split costs: each arm's share of the engine's own rate that is lost. And each arm's rate by vLLM's."""
    engine, served, vllm = (figures.get(name, {}) for name in ("engine", "services", "vllm"))
    lost, times_vllm = {}, {}
    for name, arm in {**engine, **served}.items():
        if not (isinstance(arm, dict) and "tokens_per_second" in arm):
            continue
        count, rate = name.rpartition(", ")[2], arm["tokens_per_second"]
        alone = engine.get(f"{IN_PROCESS}, {count}", {})
        if name in served and "tokens_per_second" in alone:
            lost[name] = 1 - rate / alone["tokens_per_second"]
        if count in vllm:
            times_vllm[name] = rate / vllm[count]
    return {"lost": lost, "target": TARGET_SPLIT, "times_vllm": times_vllm, "target_times_vllm": TARGET_VLLM}


def print_table(geometry: str, figures: dict[str, Any], concurrency: tuple[int, ...]) -> None:
    """An arm a line: tokens per second, what the split costs, and how many times vLLM's."""
    ratio, vllm = figures["ratios"], figures["vllm"]
    print(f"\n{geometry}: tokens/s (lost of the engine's own, times vLLM's)", flush=True)
    for arm in (IN_PROCESS, STAND_INS, ONE, SEVERAL):
        cells = []
        for name in (f"{arm}, {count}" for count in concurrency):
            rate = {**figures.get("engine", {}), **figures.get("services", {})}.get(name, {}).get("tokens_per_second")
            lost, times = ratio["lost"].get(name), ratio["times_vllm"].get(name)
            told = [f"{lost:+.1%}" if lost is not None else "", f"{times:.2f}x" if times is not None else ""]
            cells.append(f"{rate:7.0f} ({', '.join(filter(None, told))})" if rate else "-")
        print(f"  {arm:<40}" + "".join(f"{cell:>26}" for cell in cells), flush=True)
    print(f"  {'vLLM, from pictures':<40}" + "".join(f"{vllm.get(str(n), 0):>26.0f}" for n in concurrency), flush=True)


if __name__ == "__main__":
    sys.exit(main())
