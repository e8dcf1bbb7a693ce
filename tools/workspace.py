"""What the tools share: where things are, and whether a missing tool is an error."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diptych"
"""Kept between runs and clones; safe to delete."""


def is_strict() -> bool:
    """Whether a check whose tool is missing fails instead of being skipped."""
    return os.environ.get("STRICT") == "1" or os.environ.get("CI") == "true"


def digest(*parts: object) -> str:
    """A short name for a list of strings, paths (their content) and other values (their repr)."""
    sha = hashlib.sha256()
    for part in parts:
        content = part.read_bytes() if isinstance(part, Path) else str(part).encode()
        sha.update(len(content).to_bytes(8, "big") + content)
    return sha.hexdigest()[:16]


def run(command: Sequence[str | Path]) -> None:
    """Run a command whose output only matters if it fails."""
    words = [str(part) for part in command]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout}\nfailed ({done.returncode}): {' '.join(words)}")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; the cache is shared by every clone of this user."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
