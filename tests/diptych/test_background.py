"""Work that nobody waits for: its result while somebody does, and the end of a process that it still runs in."""

from __future__ import annotations

import asyncio
import contextvars
import subprocess
import sys
import threading

import pytest

from diptych.service.background import in_background, is_busy

GIVEN_UP = """
import asyncio, atexit, os, signal, threading
from diptych.service.background import in_background
from diptych.service.lifecycle import run_service

class Booting:
    address = "127.0.0.1:1"
    async def start(self):
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGINT)
        await in_background(threading.Event().wait)
    async def drain(self, grace): print("drained")
    async def stop(self): print("stopped")
    async def wait_failed(self): await asyncio.Event().wait()

atexit.register(print, "the interpreter's own end")
raise SystemExit(run_service(Booting, 600.0))
"""


async def test_what_the_work_returns_or_raises() -> None:
    name = contextvars.ContextVar[str]("name")
    name.set("of the caller")
    assert await in_background(name.get) == "of the caller"
    with pytest.raises(ZeroDivisionError):
        await in_background(lambda: 1 // 0)


async def test_cancelled_it_ends_at_once() -> None:
    """The thread goes on, and that nobody takes its result is no error."""
    begun, go_on = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go_on.wait()

    task = asyncio.create_task(in_background(work))
    await asyncio.to_thread(begun.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert is_busy()
    go_on.set()
    async with asyncio.timeout(60):
        while is_busy():  # noqa: ASYNC110 - a thread's end is no event
            await asyncio.sleep(0.01)


def test_a_boot_that_is_given_up_ends_the_process_where_it_is() -> None:
    """The service has stopped in order; the interpreter does not take itself apart around a thread that runs in it."""
    done = subprocess.run([sys.executable, "-c", GIVEN_UP], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (130, "")
    assert done.stdout == "drained\nstopped\n"
