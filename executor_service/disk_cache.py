"""Files that a later boot reads instead of making their content again; safe to delete.

A file begins with the digest of what follows, and is believed only if that is right. Its name says what it was made
from.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Final

_DIGEST_BYTES: Final = 32


def cache_folder(kind: str) -> Path:
    """Where files of a kind are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diptych" / kind


def read_cached(path: Path) -> bytes | None:
    """What was kept there, if it is whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, kept = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return kept if kept and hashlib.sha256(kept).digest() == digest else None


def keep(path: Path, content: bytes) -> None:
    """Write the file whole or not at all; where nothing can be written it is made anew at every boot, no more."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(content).digest() + content)
        Path(file.name).replace(path)
