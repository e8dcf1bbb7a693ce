"""The stages of the boot, told one after the other without a gap, so that their seconds add up to the whole."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from executor_service.engine.messages import BootProgress

Report = Callable[[BootProgress], None]


@dataclass
class Stage:
    """What a stage may say of itself by its end."""

    detail: str = ""
    num_bytes: int | None = None


class Stages:
    """Reports a stage's begin and, with seconds and bytes, its end. What passes between two counts for the second.

    `began`: on `time.monotonic()`, which the processes of a machine share, what the first is counted from.
    """

    def __init__(self, report: Report, began: float | None = None) -> None:
        self._report = report
        self.since = time.monotonic() if began is None else began

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """A stage; one that fails has no end."""
        self._report(BootProgress(name, 0.0))
        stage = Stage()
        yield stage
        now = time.monotonic()
        self._report(BootProgress(name, 1.0, stage.detail, now - self.since, stage.num_bytes))
        self.since = now

    def progress(self, name: str) -> Callable[[int, int], None]:
        """Reports every hundredth of a stage, told (done, all) as often as one likes."""
        shown = -1.0

        def progress(done: int, total: int) -> None:
            nonlocal shown
            fraction = done / max(total, 1)
            if fraction - shown >= 0.01 or done == total:
                shown = fraction
                self._report(BootProgress(name, min(fraction, 0.999)))

        return progress
