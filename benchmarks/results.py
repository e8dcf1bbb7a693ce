"""What all benchmarks share: their flags, where results go, and what every result says about its origin."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
COMMIT_VARIABLE = "BENCHMARK_COMMIT"


def make_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser with the flags that every benchmark has."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes; the figures mean nothing")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file")
    return parser


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least, and the middle half's bounds."""
    quarters = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": statistics.median(values), "min": min(values), "lower": quarters[0], "upper": quarters[2]}


def write_result(name: str, figures: Any, options: argparse.Namespace, load_before: float) -> Path:
    """Write figures with date, machine, load, versions, commit and flags; returns the file."""
    options.output.mkdir(parents=True, exist_ok=True)
    path: Path = options.output / f"{name}.json"
    flags = {flag: _plain(value) for flag, value in vars(options).items() if flag != "output"}
    origin = {"name": name, **_origin(), "load_average": {"before": load_before, "after": os.getloadavg()[0]}}
    path.write_text(json.dumps({**origin, "flags": flags, "figures": rounded(figures)}, indent=1) + "\n", "utf-8")
    print(f"written to {path}")
    return path


def _plain(value: Any) -> Any:
    """A flag's value as JSON has it; of paths outside the repository only the name."""
    if isinstance(value, Path):
        root = Path(__file__).resolve().parent.parent
        path = value.resolve()
        return str(path.relative_to(root)) if path.is_relative_to(root) else path.name
    return value


def rounded(value: Any) -> Any:
    """Every float to five significant digits: more is noise."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _origin() -> dict[str, Any]:
    import torch
    import transformers

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(Path(__file__).parent),
        "machine": {"processor": _processor(), "cores": os.cpu_count(), **_gpu()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def commit(folder: Path) -> str:
    """The commit that a folder is checked out at; `-dirty` if more than results has changed since.

    A copy without its history says what COMMIT_VARIABLE says.
    """
    if told := os.environ.get(COMMIT_VARIABLE):
        return told
    name = _git(folder, "rev-parse", "--short", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--", ":(top)", ":(top,exclude)benchmarks/results")
    return (name or "unknown") + ("-dirty" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _gpu() -> dict[str, Any]:
    """The first GPU's name, memory and driver, as the driver says; nothing where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.partition("\n")[0].split(",")]
    return {"gpu": dict(zip(("name", "memory", "driver"), values, strict=True))} if len(values) == 3 else {}


def _processor() -> str:
    """The processor's name, as the kernel has it where there is one that says."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
