"""The boot as a person sees it: a log line per stage, which add up to the last line, and a bar while weights load."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from tqdm import tqdm

from executor_service.engine.messages import BootProgress

LOG = logging.getLogger("diptych.boot")


class BootLog:
    """Shows BootProgress messages; the bar only where somebody watches."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._seconds = 0.0

    def show(self, progress: BootProgress) -> None:
        """Log a finished stage; move the bar of a running one."""
        if progress.seconds is None:
            self._move(progress)
            return
        self._close()
        self._seconds += progress.seconds
        parts = [f"{progress.seconds:.2f} s"]
        if progress.num_bytes is not None:
            parts.append(f"{progress.num_bytes / 2**20:,.1f} MiB")
        if progress.detail:
            parts.append(progress.detail)
        LOG.info("%s: %s", progress.stage, ", ".join(parts))

    def end(self, began: float) -> None:
        """The executor is SERVING; `began` is when the boot did, on `time.monotonic()`."""
        seconds = time.monotonic() - began
        self.show(BootProgress("start_serving", 1.0, seconds=seconds - self._seconds))
        LOG.info("boot: %.2f s in all", seconds)

    def _move(self, progress: BootProgress) -> None:
        if not sys.stderr.isatty():
            return
        if self._bar is None:
            self._bar = tqdm(total=100, desc=progress.stage, unit="%", leave=False)
        self._bar.update(round(progress.fraction * 100) - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
