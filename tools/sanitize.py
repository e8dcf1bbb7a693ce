"""Runs every kernel under NVIDIA's compute-sanitizer, and says of each op and tool whether anything was found.

    python tools/sanitize.py [--tools memcheck racecheck] [--logs FOLDER] [OP ...]

The ops are first launched without it, which compiles the kernels and shows that they run at all; then the tools
watch the same launches, side by side. Exit 1 if a tool reports anything, or an op fails.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from require_gpu import missing
from workspace import ROOT

TOOLS = {
    "memcheck": ["--leak-check", "no", "--padding", "256", "--report-api-errors", "no"],
    "racecheck": [],
    "initcheck": [],
    "synccheck": [],
}
"""Memcheck without errors of the driver's API: cuda.bindings asks on loading for functions that an older driver lacks.
Launches raise what the driver tells them, so nothing of ours goes unseen."""
PLACES = ("/usr/local/cuda/bin/compute-sanitizer", "/usr/local/cuda/compute-sanitizer/compute-sanitizer")
LAUNCHES = "tests.executor_service.gpu.launches"
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
"""An allocation for every tensor: the tools know the bounds of allocations, not those of tensors in a pool."""
FOUND = 9
"""Exit code of a tool that has found something."""
LIMIT_SECONDS = 140
SHOWN_LINES = 60
_REPORT = re.compile(r"^(FAILED|========= (?!COMPUTE-SANITIZER|[A-Z]+ SUMMARY)\S)")
_SUMMARY = re.compile(r"^========= ([A-Z]+ SUMMARY: .*)")
_OP = re.compile(r"^op (.*)")


@dataclass(frozen=True)
class Outcome:
    """What came of the launches under one tool."""

    tool: str
    log: str
    code: int | None
    seconds: float

    @property
    def reports(self) -> Counter[str]:
        """By the ops that were being launched; those without any are there too."""
        reports, op = Counter[str](), "-"
        for line in self.log.splitlines():
            if (begins := _OP.match(line)) is not None:
                op = begins[1]
                reports[op] += 0
            elif _REPORT.match(line):
                reports[op] += 1
        return reports

    @property
    def is_clean(self) -> bool:
        """It came to the end, and the tool found nothing."""
        return self.code == 0 and not self.reports.total() and self.log.count("op -") == 1

    def __str__(self) -> str:
        summaries = [match[1] for match in map(_SUMMARY.match, self.log.splitlines()) if match is not None]
        end = "did not end" if self.code is None else f"exit code {self.code}"
        return f"{self.tool:<12} {'clean' if self.is_clean else end}, {self.seconds:.0f} s. {' '.join(summaries)}"


def sanitizer() -> str | None:
    """The tool's path, if it is installed."""
    return shutil.which("compute-sanitizer") or next((path for path in PLACES if Path(path).exists()), None)


def launch(tool: str, prefix: list[str], ops: list[str]) -> Outcome:
    """All launches, behind `prefix`."""
    command = [*prefix, sys.executable, "-m", LAUNCHES, *ops]
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):  # the watched process too, which is a child of the tool's
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.seek(0)
        return Outcome(tool, log.read(), code, time.monotonic() - began)


def watch(program: str, tool: str, ops: list[str]) -> Outcome:
    """All launches under one tool."""
    return launch(tool, [program, "--tool", tool, "--error-exitcode", str(FOUND), *TOOLS[tool]], ops)


def show(outcomes: list[Outcome]) -> None:
    """What was found of every op, beginnings of the logs of tools that found something, and a line of each tool."""
    for outcome in outcomes:
        if not outcome.is_clean:
            lines = [line for line in outcome.log.splitlines() if line.startswith(("=====", "op ", "FAILED"))] or [
                outcome.log
            ]
            print(f"--- {outcome.tool}", *lines[:SHOWN_LINES], sep="\n")
    ops = dict.fromkeys(op for outcome in outcomes for op in outcome.reports if op != "-")
    for op in ops:
        found = {outcome.tool: outcome.reports.get(op) for outcome in outcomes}
        words = (f"{tool} {'not run' if count is None else count or 'clean'}" for tool, count in found.items())
        print(f"{op:<56} {', '.join(words)}")
    print(*outcomes, sep="\n")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", help="names of ops; all if there are none")
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS))
    parser.add_argument("--logs", type=Path, help="folder for the whole output of each tool")
    options = parser.parse_args()
    found = missing()
    if (program := sanitizer()) is None:
        found.append("no compute-sanitizer: it comes with the CUDA toolkit; put it on PATH")
    if found or program is None:
        raise SystemExit("this needs a GPU and compute-sanitizer, and this is missing:\n- " + "\n- ".join(found))
    outcomes = [launch("no tool", [], options.ops)]
    with ThreadPoolExecutor() as tools:
        outcomes += list(tools.map(lambda tool: watch(program, tool, options.ops), options.tools))
    if options.logs is not None:
        options.logs.mkdir(parents=True, exist_ok=True)
        for outcome in outcomes:
            (options.logs / f"{outcome.tool}.log").write_text(outcome.log, "utf-8")
    show(outcomes)
    raise SystemExit(not all(outcome.is_clean for outcome in outcomes))


if __name__ == "__main__":
    main()
