"""Both services as processes of their own, for as long as somebody needs them."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

FLAGS = ["--port", "0", "--executor-port", "0", "--limit-mm-per-prompt", "image=4", "--log-level", "warning"]


@contextlib.contextmanager
def serve(model: Path) -> Iterator[str]:
    """`diptych serve` on free loopback ports; yields the public HOST:PORT and ends both services afterwards."""
    print(f"starting both services with {model.name} …", flush=True)
    command = [sys.executable, "-m", "diptych.cli.main", "serve", "--model", str(model), *FLAGS]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("listening on "):
            raise SystemExit(f"the services did not start (exit code {process.wait()})")
        yield line.removeprefix("listening on ").strip()
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
        print("both services have stopped")
