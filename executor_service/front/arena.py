"""Shared memory for item tensors: the front writes what arrives, the engine reads it in place."""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Final

ALIGNMENT: Final = 256
"""Every tensor starts at a multiple of this, so that any dtype and any device copy likes it."""
TOUCHED_AHEAD: Final = 8 << 20
"""Bytes that are touched before they are handed out."""
TOUCHED_AT_ONCE: Final = 1 << 20
"""Bytes that are touched in one go, about a millisecond."""


def aligned(num_bytes: int) -> int:
    """`num_bytes` rounded up to the alignment."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, order=True)
class Region:
    """A contiguous piece of the arena."""

    offset: int
    num_bytes: int

    @property
    def end(self) -> int:
        """Offset of the first byte after it."""
        return self.offset + self.num_bytes


class Arena:
    """`num_bytes` of anonymous shared memory, handed out first-fit."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = aligned(num_bytes)
        self.fd = _anonymous_file(self.num_bytes)
        self._map = mmap.mmap(self.fd, self.num_bytes)
        self.view = memoryview(self._map)
        self._free: list[Region] = [Region(0, self.num_bytes)]
        self._used: set[Region] = set()
        self._end_of_used = self._end_of_touched = 0
        while self.touch_ahead():
            pass

    @property
    def num_used_bytes(self) -> int:
        """Bytes handed out."""
        return sum(region.num_bytes for region in self._used)

    def take(self, num_bytes: int) -> Region | None:
        """A region of at least that size, or None if there is none."""
        num_bytes = aligned(num_bytes)
        if not num_bytes:
            return Region(0, 0)
        for index, free in enumerate(self._free):
            if free.num_bytes >= num_bytes:
                region = Region(free.offset, num_bytes)
                rest = Region(region.end, free.num_bytes - num_bytes)
                self._free[index : index + 1] = [rest] if rest.num_bytes else []
                self._used.add(region)
                self._end_of_used = max(self._end_of_used, region.end)
                return region
        return None

    def touch_ahead(self) -> bool:
        """Touch some of the memory that nobody has had yet, when nobody waits; returns whether more is to be done.

        The system finds and clears a page when it is touched first. In a virtual machine that takes longer than to
        copy and to hash what goes there.
        """
        start = max(self._end_of_touched, self._end_of_used)
        goal = min(self._end_of_used + TOUCHED_AHEAD, self.num_bytes)
        end = min(start + TOUCHED_AT_ONCE, goal)
        pages = self.view[start : end : mmap.PAGESIZE]
        pages[:] = bytes(len(pages))
        self._end_of_touched = max(start, end)
        return end < goal

    def release(self, region: Region) -> None:
        """Take a region back."""
        if not region.num_bytes:
            return
        self._used.remove(region)
        insort(self._free, region)
        self._merge_around(bisect_left(self._free, region))

    def close(self) -> None:
        """Free the memory; nobody may use a view of it any more."""
        self.view.release()
        self._map.close()
        os.close(self.fd)

    def check_integrity(self) -> None:
        """AssertionError unless free and used regions tile the arena."""
        end = 0
        for region in sorted([*self._free, *self._used]):
            if region.offset != end:
                raise AssertionError(f"the arena is not whole at byte {end}: the next region is {region}")
            end = region.end
        if end != self.num_bytes:
            raise AssertionError(f"the arena is not whole: regions end at {end} of {self.num_bytes} bytes")

    def _merge_around(self, index: int) -> None:
        for left in (index, index - 1):
            if 0 <= left < len(self._free) - 1 and self._free[left].end == self._free[left + 1].offset:
                first, second = self._free[left], self._free[left + 1]
                self._free[left : left + 2] = [Region(first.offset, first.num_bytes + second.num_bytes)]


def _anonymous_file(num_bytes: int) -> int:
    """Memory without a name, so that nothing is left behind whatever happens to the processes."""
    if sys.platform == "linux":
        fd = os.memfd_create("diptych-arena")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, num_bytes)
    return fd
