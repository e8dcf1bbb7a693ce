"""`diptych executor` as a user runs it, for tests of its whole life."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from registry import InputContext, MediaLimits
from registry.families import bind_family
from registry.fingerprint import fingerprint
from tests.executor_service.peer import Planner


class Command:
    """`diptych executor` as a user runs it."""

    def __init__(self, checkpoint: Path, *flags: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "diptych.cli.main", "executor", "--model", str(checkpoint), "--port", "0",
             "--limit-mm-per-prompt", "image=4", "--check-integrity", *flags],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.address = self.process.stdout.readline().removeprefix("listening on ").strip()

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def engine_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return next(int(pid) for pid in children if b"engine.process" in Path(f"/proc/{pid}/cmdline").read_bytes())

    def engine_stacks(self) -> str:
        """What the engine process says of its threads, up to the main thread's first call."""
        os.kill(self.engine_pid(), signal.SIGUSR1)
        lines = [self.process.stderr.readline()]
        while "_run_module_as_main" not in lines[-1]:
            lines.append(self.process.stderr.readline())
            assert lines[-1], lines
        return "".join(lines)


def health(channel: grpc.Channel, service: str) -> int:
    return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service)).status


@contextlib.contextmanager
def booting(checkpoint: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """`diptych executor` in a process group of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "diptych.cli.main", "executor", "--model", str(checkpoint), "--port", "0", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def read_until(process: subprocess.Popen[str], text: str) -> None:
    """Its log up to the line that has `text`."""
    assert any(text in line for line in process.stderr), text


def planner_of(checkpoint: Path) -> Planner:
    """Makes honest requests for an executor of this checkpoint."""
    family = bind_family(InputContext.from_checkpoint(checkpoint, MediaLimits({"image": 4})))
    return Planner(family, fingerprint(family).digest)
