"""When this process began, so that what a start takes can be told with what the interpreter and imports took of it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

_START_FIELD: Final = 21
"""Of /proc/self/stat, from 0: clock ticks since the machine's boot."""
_IMPORTED: Final = time.monotonic()


def process_began() -> float:
    """On `time.monotonic()`; where the system does not say, when this module was imported."""
    try:
        # The second field is the program's name in parentheses, in which anything may stand.
        fields = Path("/proc/self/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[_START_FIELD - 2]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return _IMPORTED
    began = time.monotonic() - age
    return began if began <= _IMPORTED else _IMPORTED
