"""Parts of a benchmark in processes of their own: one that fails or hangs costs its own figures and no others.

A part writes what it has to a JSON file after every figure, so that what it had measured by then is kept.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from executor_service.front.engine_link import ENVIRONMENT

PATIENCE_SECONDS = 10.0
TICK_SECONDS = 1.0
FREE_BYTES = 2 << 30
"""In use on a GPU that nobody uses, at the most."""
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
ROOT = Path(__file__).resolve().parent.parent.parent


@contextlib.contextmanager
def sheets(output: Path) -> Iterator[Path]:
    """A folder for sheets beside the results: what was measured by then is there even if everything is killed."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="sheets-", dir=output) as folder:
        yield Path(folder)


class Sheet:
    """Figures of one process, on disk after every change."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.figures: dict[str, Any] = {}

    def note(self, name: str, value: Any) -> None:
        """Add a figure."""
        self.figures[name] = value
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.figures), "utf-8")
        temporary.replace(self._path)

    def measure(self, name: str, part: Callable[[], Any]) -> bool:
        """Note what a part returns, or how it failed; False if it failed."""
        began = time.perf_counter()
        try:
            value = part()
        except Exception as error:  # one part's failure must not cost the others
            traceback.print_exc()
            self.note(name, {"error": f"{type(error).__name__}: {error}"[:500]})
            return False
        finally:
            print(f"[{name}: {time.perf_counter() - began:.1f} s]", flush=True)
        self.note(name, value)
        return True


def run_module(
    module: str, *flags: str, sheet: Path, limit: float, on_change: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """What `python -m MODULE FLAGS --sheet FILE` has noted by its end, at the latest after `limit` seconds.

    An engine in it finds the environment that the front gives its own. `on_change` gets what is noted so far whenever
    that is more.
    """
    command = [sys.executable, "-m", module, *flags, "--sheet", str(sheet)]
    sheet.unlink(missing_ok=True)
    known: dict[str, Any] = {}

    def look() -> None:
        nonlocal known
        if on_change is not None and (figures := _read(sheet)) != known:
            on_change(known := figures)

    ended = run(command, limit, {**ENVIRONMENT, **os.environ}, on_tick=look)
    return {**_read(sheet), **ended}


def _read(sheet: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads(sheet.read_text("utf-8")))
    return {}


def run(
    command: Sequence[str], limit: float, environment: Mapping[str, str] | None = None, log: Path | None = None,
    on_tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:  # fmt: skip
    """Run a command and everything that it starts for at most `limit` seconds; how it failed, empty if it did not.

    `on_tick` is called every second.
    """
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("w")) if log else None
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **(environment or {})}, start_new_session=True, stdout=output,
            stderr=subprocess.STDOUT if output else None, preexec_fn=_end_with_parent,  # noqa: PLW1509 - no threads here
        )  # fmt: skip
        try:
            code = _wait(process, limit, on_tick)
            if code is None:
                _ask_where(process)
        finally:
            _end(process)
            _wait_until_freed()
    if code is None:
        return {"error": f"not done after {limit:g} s"}
    return {"error": f"exit code {code} after {time.perf_counter() - began:.0f} s"} if code else {}


def _wait(process: subprocess.Popen[bytes], limit: float, on_tick: Callable[[], None]) -> int | None:
    """The exit code, or None after `limit` seconds."""
    until = time.monotonic() + limit
    while (left := until - time.monotonic()) > 0:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(min(left, TICK_SECONDS))
        on_tick()
    return None


def _ask_where(process: subprocess.Popen[bytes]) -> None:
    """Let the process write where all its threads are."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        process.send_signal(signal.SIGUSR1)
        process.wait(1)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and its group: what hangs keeps the GPU's memory from whatever comes next."""
    with contextlib.suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)  # so that it ends the services it has started
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def used_bytes() -> int:
    """Of the first GPU's memory, by all processes; 0 without one. Asks the driver without a context of its own."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
        return int(done.stdout.split()[0]) * (1 << 20)
    except (OSError, IndexError, ValueError, subprocess.TimeoutExpired):
        return 0


def _wait_until_freed() -> None:
    """What a process had of the GPU comes back some time after its end; the next one measures what is free."""
    until = time.monotonic() + PATIENCE_SECONDS
    while used_bytes() > FREE_BYTES and time.monotonic() < until:
        time.sleep(0.2)


def _end_with_parent() -> None:
    """In a new process: be told to end when the one that has started it is gone, whatever ended that."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def exit_when_told() -> None:
    """SIGTERM as an exception, so that whoever has started services ends them; SIGUSR1 shows where all threads are."""
    faulthandler.register(signal.SIGUSR1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
