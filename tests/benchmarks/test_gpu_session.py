"""Parts of a GPU benchmark in processes of their own: what fails or hangs costs its own figures and leaves nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import session
from benchmarks.gpu.peers import compare
from benchmarks.gpu.served import ratios
from benchmarks.gpu.served_arms import IN_PROCESS, ONE
from benchmarks.gpu.session import Sheet, run


def test_a_sheet_keeps_what_came_before_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = Sheet(tmp_path / "sheet.json")
    assert sheet.measure("good", lambda: {"ms": 1.5})
    assert not sheet.measure("bad", lambda: 1 / 0)
    figures = json.loads((tmp_path / "sheet.json").read_text("utf-8"))
    assert figures == {"good": {"ms": 1.5}, "bad": {"error": "ZeroDivisionError: division by zero"}}
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_exit_codes_are_told() -> None:
    assert run([sys.executable, "-c", "pass"], 30) == {}
    assert run([sys.executable, "-c", "raise SystemExit(3)"], 30)["error"].startswith("exit code 3 after ")


def test_what_hangs_is_ended_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that does not listen to SIGTERM, and a child of it."""
    monkeypatch.setattr(session, "PATIENCE_SECONDS", 0.3)
    log = tmp_path / "log"
    program = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(100)\n"
    )
    began = time.monotonic()
    assert run([sys.executable, "-c", program], 2.0, log=log) == {"error": "not done after 2 s"}
    assert time.monotonic() - began < 30
    child = Path("/proc") / log.read_text("utf-8").strip()
    until = time.monotonic() + 5
    while child.exists() and "State:\tZ" not in (child / "status").read_text("utf-8") and time.monotonic() < until:
        time.sleep(0.05)
    assert not child.exists() or "State:\tZ" in (child / "status").read_text("utf-8")


def test_what_hangs_says_where(tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = "import time; from benchmarks.gpu.session import exit_when_told; exit_when_told(); time.sleep(100)"
    assert run([sys.executable, "-c", program], 5.0, log=log) == {"error": "not done after 5 s"}
    assert 'File "<string>", line 1 in <module>' in log.read_text("utf-8")


def test_ratios_are_of_times_or_of_rates() -> None:
    ours = {"decode_16": {"step_ms": {"median": 4.0}, "tokens_per_second": 2200}, "boot": {"num_blocks": 90}}
    theirs = {"decode_16": {"step_ms": {"median": 5.0}, "tokens_per_second": 2000}, "boot": {"num_blocks": 100}}
    rows = compare({"ours": ours, "vllm": theirs})
    assert rows["decode_16, step ms"]["ratio"] == pytest.approx(1.25)
    assert rows["decode_16, tokens/s"]["ratio"] == pytest.approx(1.1)
    assert (rows["KV blocks"]["ratio"], rows["KV blocks"]["met"]) == (pytest.approx(0.9), False)
    assert "ratio" not in rows["prefill, images/s"]


def test_what_the_split_costs() -> None:
    figures = {
        "engine": {f"{IN_PROCESS}, 64": {"tokens_per_second": 1000.0}, f"{IN_PROCESS}, 256": {"error": "none"}},
        "services": {f"{ONE}, 64": {"tokens_per_second": 960.0}, f"{ONE}, 256": {"tokens_per_second": 1.0}},
    }
    assert ratios(figures)["lost"] == {f"{ONE}, 64": pytest.approx(0.04)}


def test_a_part_ends_with_whoever_started_it(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from benchmarks.gpu.session import run\n"
        "run([sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(100)'], 90)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=session.ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = Path("/proc") / process.stdout.readline().strip()
    assert child.exists()
    process.kill()
    process.wait()
    process.stdout.close()
    until = time.monotonic() + 10
    while child.exists() and "State:\tZ" not in (child / "status").read_text("utf-8") and time.monotonic() < until:
        time.sleep(0.05)
    assert not child.exists() or "State:\tZ" in (child / "status").read_text("utf-8")
