"""The bytes a header walk may look at, and the two errors it may end in.

Every walk goes through `FilePrefix`, so running past the bytes at hand always ends the same way: `TruncatedHeader`
when the file goes on behind the prefix, `HeaderError` when the file itself ends there.
"""

import re
import struct
from collections.abc import Iterator
from itertools import repeat
from typing import Any

SUPPORTED_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")

# A walk step costs about half a microsecond, so a hostile file costs tens of milliseconds at most. Honest files stay
# far below: even 64 MiB of PNG in 1 KiB chunks take half of it.
MAX_STEPS = 1 << 17
MAX_JUNK = 1 << 20  # bytes between two segments or blocks that belong to neither


class HeaderError(ValueError):
    """Not an image, an unsupported format, or a header that is corrupt or cut off."""


class TruncatedHeader(HeaderError):  # noqa: N818 (a state of the prefix, not of the file)
    """The prefix cannot settle size and orientation; the file goes on behind it."""

    bytes_needed: int

    def __init__(self, message: str, bytes_needed: int) -> None:
        """`bytes_needed` is an absolute prefix length, longer than the prefix that was given."""
        super().__init__(message)
        self.bytes_needed = bytes_needed


class FilePrefix:
    """The first bytes of a file whose total size is known (all of them, when both sizes are equal)."""

    def __init__(
        self, data: bytes | memoryview, total_bytes: int | None = None, facts: str = "size and orientation"
    ) -> None:
        """Keep a view of `data`, never a copy. Without `total_bytes`, `data` is the whole file.

        `facts` is what the walk is for, in messages.
        """
        self.facts = facts
        self.data = memoryview(data).cast("B")
        self.num_bytes = len(self.data)
        self.total_bytes = self.num_bytes if total_bytes is None else total_bytes

    def require_in_file(self, end: int) -> None:
        """Fail unless the file itself reaches to `end`, whether or not the prefix does."""
        if end > self.total_bytes:
            raise HeaderError(f"truncated: the header goes on to byte {end}, the file ends at {self.total_bytes}")

    def require(self, end: int) -> None:
        """Fail unless the prefix reaches to `end`."""
        if end > self.num_bytes:
            self.require_in_file(end)
            raise self.needs(end)

    def needs(self, end: int) -> HeaderError:
        """The error for a walk that wants to see up to `end` (or as far as the file goes) and cannot."""
        if self.num_bytes >= self.total_bytes:
            return HeaderError(f"truncated: the file ends at byte {self.total_bytes}, inside its header")
        end = min(end, self.total_bytes)
        message = f"the first {self.num_bytes} of {self.total_bytes} bytes do not settle {self.facts}"
        return TruncatedHeader(f"{message}: at least {end} are needed", end)

    def require_whole(self) -> None:
        """Fail unless the prefix is the whole file."""
        if self.num_bytes < self.total_bytes:
            raise self.needs(self.total_bytes)

    def take(self, start: int, length: int) -> bytes:
        """Copy `length` bytes from `start`."""
        self.require(start + length)
        return bytes(self.data[start : start + length])

    def unpack(self, layout: struct.Struct, start: int) -> tuple[Any, ...]:
        """Unpack a fixed layout at `start`."""
        self.require(start + layout.size)
        return layout.unpack_from(self.data, start)

    def search(self, pattern: re.Pattern[bytes], position: int, num_ahead: int) -> re.Match[bytes] | None:
        """Find what comes next behind junk; None: the file ends before. `num_ahead`: bytes worth asking for at once."""
        match = pattern.search(self.data, position, position + MAX_JUNK)
        if match is None and self.num_bytes >= position + MAX_JUNK:
            raise HeaderError(f"more than {MAX_JUNK} bytes of junk from byte {position}")
        if match is None and max(position, self.num_bytes) < self.total_bytes:
            raise self.needs(max(position, self.num_bytes) + num_ahead)
        return match

    def byte(self, position: int) -> int:
        """One byte as a number."""
        self.require(position + 1)
        return self.data[position]


def bounded_steps(what: str, most: int = MAX_STEPS) -> Iterator[None]:
    """Yield `most` times, then refuse: `what` names the things walked over."""
    yield from repeat(None, most)
    raise HeaderError(f"more than {most} {what}")
