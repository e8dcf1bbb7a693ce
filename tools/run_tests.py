"""Runs every test that needs no GPU: in .venv, then those of tests/torch_free in the two torch-free environments.

Ends with one line that counts them all.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

from environments import TORCH_FREE, torch_free
from workspace import ROOT, VENV

# As many processes as cores; a module's tests stay together, with the services that they share.
PARALLEL = ("--numprocesses=auto", "--maxprocesses=8", "--dist=loadfile")
TORCH_FREE_TESTS = ROOT / "tests" / "torch_free"


def run_pytest(title: str, python: Path, report: Path, *arguments: str | Path) -> int:
    """One pytest run; its exit code."""
    print(f"\n=== {title}", flush=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    # The processes share the cores: more threads than one each would only hinder one another.
    environment.setdefault("OMP_NUM_THREADS", "1")
    environment["DEVELOP_PYTHON"] = str(VENV / "bin" / "python")
    # Through the script, not `-m pytest`: that would put the clone before the installed packages.
    command = [python.with_name("pytest"), "-q", f"--junitxml={report}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def counts(report: Path) -> Counter[str]:
    """Tests by outcome."""
    if not report.is_file():
        return Counter(failed=1)
    suites = list(ET.parse(report).iter("testsuite"))
    total, failures, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    return Counter(passed=total - failures - errors - skipped, failed=failures + errors, skipped=skipped)


def main() -> None:
    """Run all, also after one has failed; exit 1 if any did."""
    totals: Counter[str] = Counter()
    codes = []
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "develop.xml"
        codes.append(run_pytest(".venv", VENV / "bin" / "python", report, *PARALLEL, "-m", "not gpu"))
        totals += counts(report)
        for name in TORCH_FREE:
            report = Path(scratch) / f"{name}.xml"
            with torch_free(name) as folder:
                arguments = ("-c", TORCH_FREE_TESTS / "pytest.ini", TORCH_FREE_TESTS)
                codes.append(run_pytest(f"torch-free, {name}", folder / "bin" / "python", report, *arguments))
            totals += counts(report)
    print(f"\ntotal: {totals['passed']} passed, {totals['failed']} failed, {totals['skipped']} skipped", flush=True)
    sys.exit(any(codes))


if __name__ == "__main__":
    main()
