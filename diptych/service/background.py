"""What a boot imports and reads beside its event loop, in a thread that nobody waits for when the boot is given up.

An import cannot be interrupted, and asyncio and the interpreter both wait for threads of asyncio's own to end.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final, NoReturn, TypeVar

ResultT = TypeVar("ResultT")
_NAME: Final = "diptych_boot"


async def in_background(work: Callable[[], ResultT]) -> ResultT:
    """What `work` returns or raises. Cancelled, this ends at once, and the thread goes on for nobody."""
    future: Future[ResultT] = Future()
    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(_fulfil, future, work), name=_NAME, daemon=True).start()
    return await asyncio.wrap_future(future)


def is_busy() -> bool:
    """Whether such a thread still runs."""
    return any(thread.name == _NAME for thread in threading.enumerate())


def end_process(code: int) -> NoReturn:
    """End without the interpreter's own end, in which a thread that comes back from native code may crash."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _fulfil(future: Future[ResultT], work: Callable[[], ResultT]) -> None:
    future.set_running_or_notify_cancel()  # from here on it cannot be cancelled, so that its result can be set
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)
