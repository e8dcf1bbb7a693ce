"""What the engine process does not import: packages that transformers loads wherever they are installed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Final

UNUSED: Final = ("accelerate", "librosa", "peft", "scipy", "sklearn", "torchaudio", "torchvision")
"""Seconds to import, and used by transformers for what an engine never does: training, audio files, beam heuristics,
its own image processors. They are optional to it."""


@contextlib.contextmanager
def without_unused() -> Iterator[None]:
    """Inside, they seem not to be installed; afterwards a model's own code may import them.

    What has been imported already stays.
    """
    hidden = [name for name in UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: not to be found
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
