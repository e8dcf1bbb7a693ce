"""Services as processes of their own, and the processor time they take."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SERVE = ("diptych.cli.main", "serve")
EXECUTOR = ("diptych.cli.main", "executor")
PREPROCESS = ("diptych.cli.main", "preprocess")
STAND_IN_EXECUTOR = ("benchmarks.stand_in_executor",)


def use_threads(count: int) -> None:
    """So many threads for torch, in this process and in those it starts: every arm has as many."""
    import torch

    os.environ["OMP_NUM_THREADS"] = str(count)
    torch.set_num_threads(count)


@dataclass(frozen=True)
class Service:
    """A service that listens at `address`, in process `pid`."""

    address: str
    pid: int


@contextlib.contextmanager
def started(module: tuple[str, ...], *flags: str) -> Iterator[Service]:
    """Run `python -m MODULE FLAGS` on a free port; stops it afterwards."""
    command = [sys.executable, "-m", *module, "--log-level", "warning", "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("listening on "):
            raise SystemExit(f"{' '.join(module)} did not start (exit code {process.wait()})")
        yield Service(line.removeprefix("listening on ").strip(), process.pid)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def processor_seconds(pid: int) -> float:
    """What a process has used so far, without its children; nan where /proc does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def child_of(pid: int) -> int:
    """The first child of a process, 0 if none is known."""
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text("utf-8").split()
        return int(children[0]) if children else 0
    return 0
