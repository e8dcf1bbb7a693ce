"""Host time of an engine step: what is left of it when the model's forward is free.

Requests that all decode, each with a picture in its prompt, at several batch sizes. `scheduling and bookkeeping` is
schedule, update and report; `prepare inputs` and `sample` are the runner's and the sampler's host work, with every
tensor operation at its smallest; `send` pickles the report. `--against CHECKOUT` measures another checkout in turn
with this one, for before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import commit, make_parser, spread, write_result

HERE = Path(__file__).parent
COUNTS = (1, 16, 64, 256)
TARGET_MS = 1.0
TARGET_COUNT = 256


def main(argv: list[str] | None = None) -> int:
    """Print and write milliseconds per stage of a step."""
    parser = make_parser("host", __doc__)
    parser.add_argument("--steps", type=int, default=300, help="steps of each measurement (default 300)")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats (default 5)")
    parser.add_argument("--against", type=Path, help="another checkout to measure in turn with this one")
    options = parser.parse_args(argv)
    if options.quick:
        options.steps, options.repeats = 5, 1
    load_before = os.getloadavg()[0]
    trees = {"this": HERE.parent, **({"before": options.against} if options.against else {})}
    figures: dict[str, Any] = {"commits": {arm: commit(tree) for arm, tree in trees.items()}}
    counts = (1, 2) if options.quick else COUNTS
    figures |= measure(trees, counts, options)
    for count in counts:
        show(count, figures[str(count)])
    if not options.quick:
        figures["target"] = {"milliseconds": TARGET_MS, "requests": TARGET_COUNT, "met": is_met(figures)}
    write_result("host", figures, options, load_before)
    return 0


def measure(trees: dict[str, Path], counts: Sequence[int], options: argparse.Namespace) -> dict[str, Any]:
    """By number of requests, every arm's milliseconds by stage over all its steps, repeats in turn; and its profile."""
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in trees}
    for repeat in range(options.repeats):
        for arm, tree in trees.items():
            results[arm].append(run(tree, counts, options.steps, is_profiled=repeat == options.repeats - 1))
    return {
        str(count): {arm: summary([result[str(count)] for result in runs]) for arm, runs in results.items()}
        for count in counts
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Milliseconds by stage over the steps of all runs, and the last run's profile."""
    milliseconds = {
        stage: spread([1000 * seconds for run in runs for seconds in run["steps"][stage]]) for stage in runs[0]["steps"]
    }
    return {"milliseconds": milliseconds, "profile": runs[-1]["profile"]}


def run(tree: Path, counts: Sequence[int], num_steps: int, is_profiled: bool) -> dict[str, Any]:
    """One measurement of every number of requests, in a process of its own."""
    command = [sys.executable, HERE / "host_steps.py", str(num_steps), str(int(is_profiled)), *map(str, counts)]
    environment = {**os.environ, "PYTHONPATH": str(tree.resolve())}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def show(count: int, arms: dict[str, Any]) -> None:
    """A line per stage."""
    print(f"{count} requests, milliseconds per step: median (least)")
    for stage in arms["this"]["milliseconds"]:
        cells = (arms[arm]["milliseconds"][stage] for arm in arms)
        columns = (f"{arm} {cell['median']:7.3f} ({cell['min']:.3f})" for arm, cell in zip(arms, cells, strict=True))
        print(f"  {stage:<27} {'   '.join(columns)}", flush=True)


def is_met(figures: dict[str, Any]) -> bool:
    """Whether scheduling and bookkeeping are below the target."""
    stages = figures[str(TARGET_COUNT)]["this"]["milliseconds"]
    return bool(stages["scheduling and bookkeeping"]["median"] <= TARGET_MS)


if __name__ == "__main__":
    sys.exit(main())
