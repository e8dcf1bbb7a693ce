"""Both services as processes of their own, for as long as somebody needs them."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from pathlib import Path

FLAGS = ["--port", "0", "--executor-port", "0", "--limit-mm-per-prompt", "image=4", "--log-level", "warning"]
STOP_SECONDS = 30


@contextlib.asynccontextmanager
async def serve(model: Path) -> AsyncIterator[str]:
    """`diptych serve` on free loopback ports; yields the public HOST:PORT and ends both services afterwards."""
    print(f"starting both services with {model.name} …", flush=True)
    command = [sys.executable, "-m", "diptych.cli.main", "serve", "--model", str(model), *FLAGS]
    # A session of its own: Ctrl-C must not reach the services before their requests have ended.
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, start_new_session=True)
    try:
        assert process.stdout is not None
        line = (await process.stdout.readline()).decode()
        if not line.startswith("listening on "):
            raise SystemExit(f"the services did not start (exit code {await process.wait()})")
        yield line.removeprefix("listening on ").strip()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        await asyncio.wait_for(process.wait(), STOP_SECONDS)
        print("both services have stopped", flush=True)
