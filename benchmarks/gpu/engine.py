"""The engine in this process, without services: decode steps, prefill, first tokens, memory, mixed load.

Per geometry one process writes the checkpoint and measures the rates, one boots the engine and measures everything at
one share of the GPU, one boots it at another and runs the worst load that is admitted. Floors are what the rates
allow (see `floors`); batches that do not fit the KV cache are marked and measured all the same, as far as they go.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from benchmarks.gpu.load import BATCHES, MAX_NUM_SEQS, max_model_len
from benchmarks.gpu.options import parse_for_gpu
from benchmarks.gpu.session import Sheet, exit_when_told, run_module, sheets
from benchmarks.results import make_parser, write_result

PARTS: Final = ("first_token", "decode", "prefill", "steps", "steady", "mixed", "worst")
GEOMETRIES: Final = ("llava-1.5-7b", "llava-next-mistral-7b")
WORST_UTILIZATION: Final = 0.92
LIMITS: Final = {"rates": 120, "main": 300, "worst": 120}
"""Seconds of each process at the most."""


def main(argv: list[str] | None = None) -> int:
    """Measure all that is asked for, each process with its own time limit; or, with `--sheet`, be one of them."""
    options = parse(argv)
    exit_when_told()
    if options.sheet:
        return measure_one(options)
    load_before = os.getloadavg()[0]
    figures: dict[str, Any] = {}
    with sheets(options.output) as folder:
        for geometry in options.geometries:
            figures[geometry] = {}
            for process in processes(options.parts):
                figures[geometry][process] = start(process, geometry, folder, options, figures[geometry])
                write_result("gpu_engine", figures, options, load_before)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Flags of both kinds of process."""
    parser = make_parser("gpu.engine", __doc__)
    parser.add_argument("--geometries", type=_names, default=GEOMETRIES, help="of benchmarks.gpu.models, with commas")
    parser.add_argument("--parts", type=_names, default=PARTS, help=f"with commas, of {', '.join(PARTS)}")
    parser.add_argument("--batches", type=lambda text: tuple(map(int, text.split(","))), default=BATCHES)
    parser.add_argument("--device", default="cuda", help="cpu to try it out with a tiny geometry")
    parser.add_argument("--decoder", default="auto")
    parser.add_argument("--max-num-seqs", type=int, default=MAX_NUM_SEQS)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--utilization", type=float, default=0.9)
    parser.add_argument("--repeats", type=int, default=3, help="of every measurement of throughput (default 3)")
    parser.add_argument("--seconds", type=float, help="at most, of the process that measures most (default 300)")
    for name in ("--sheet", "--rates"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--process", default="main", help=argparse.SUPPRESS)
    return parse_for_gpu(parser, argv)


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def processes(parts: Sequence[str]) -> list[str]:
    """Those that the parts need, in order."""
    measuring = ["rates", "main"] if set(parts) - {"worst"} else []
    return [*measuring, *(["worst"] if "worst" in parts else [])]


def start(
    process: str, geometry: str, folder: Path, options: argparse.Namespace, before: dict[str, Any]
) -> dict[str, Any]:
    """Run one process and return its figures; those of the rates' process travel to the others."""
    import json

    rates = folder / "rates.json"
    if "rates" in before:
        rates.write_text(json.dumps(before["rates"].get("rates", {})), "utf-8")
    flags = [
        "--process", process, "--geometries", geometry, "--parts", ",".join(options.parts), "--rates", str(rates),
        "--batches", ",".join(map(str, options.batches)), "--device", options.device, "--decoder", options.decoder,
        "--max-num-seqs", str(options.max_num_seqs), "--repeats", str(options.repeats),
        "--utilization", str(options.utilization),
        "--max-num-batched-tokens", str(options.max_num_batched_tokens), *(["--quick"] if options.quick else []),
    ]  # fmt: skip
    limit = options.seconds if options.seconds and process == "main" else LIMITS[process]
    print(f"\n=== {geometry}: {process}", flush=True)
    return run_module("benchmarks.gpu.engine", *flags, sheet=folder / f"{process}.json", limit=limit)


def measure_one(options: argparse.Namespace) -> int:
    """One process's figures, onto its sheet."""
    from benchmarks.gpu.models import ensure_checkpoint

    sheet = Sheet(options.sheet)
    (geometry,) = options.geometries
    if options.process == "rates":
        sheet.measure("rates", lambda: measure_rates(options))
        sheet.measure("checkpoint", lambda: {"folder_is_on": ensure_checkpoint(geometry).parent.name})
    elif options.process == "worst":
        from benchmarks.gpu.worst import worst_load

        config = engine_config(geometry, options, WORST_UTILIZATION)
        sheet.measure("worst", lambda: worst_load(ensure_checkpoint(geometry), geometry, config, sheet))
    else:
        from benchmarks.gpu.engine_parts import EngineParts

        parts = EngineParts(ensure_checkpoint(geometry), geometry, options, read_rates(options))
        return parts.measure(sheet, engine_config(geometry, options, options.utilization))
    return 0


def engine_config(geometry: str, options: argparse.Namespace, utilization: float) -> dict[str, Any]:
    """What the engine is told, for `Driver`."""
    return {
        "device": options.device, "decoder": options.decoder, "max_num_seqs": options.max_num_seqs,
        "max_num_batched_tokens": options.max_num_batched_tokens, "gpu_memory_utilization": utilization,
        "max_model_len": max_model_len(geometry),
    }  # fmt: skip


def measure_rates(options: argparse.Namespace) -> dict[str, float]:
    """Of the GPU; on a CPU ones, with which the floors mean nothing."""
    from benchmarks.gpu import floors

    if options.device == "cpu":
        return asdict(floors.Rates(1.0, 1.0, 1.0, 1.0))
    rates = floors.measure_rates()
    floors.describe(rates)
    return asdict(rates)


def read_rates(options: argparse.Namespace) -> Any:
    """Those that the first process has measured."""
    import json

    from benchmarks.gpu.floors import Rates

    return Rates(**json.loads(options.rates.read_text("utf-8")))


if __name__ == "__main__":
    sys.exit(main())
