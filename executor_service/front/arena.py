"""Shared memory for item tensors: the front writes what arrives, the engine reads it in place."""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

ALIGNMENT: Final = 256
"""Every tensor starts at a multiple of this, so that any dtype and any device copy likes it."""


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


@dataclass(frozen=True, eq=False)
class Reservation:
    """Somebody waiting for a region."""

    num_bytes: int
    granted: Callable[[Region], None]


class Arena:
    """`num_bytes` of anonymous shared memory, handed out first-fit and in order of asking.

    A large reservation is never overtaken by a small one, so it cannot starve.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = aligned(num_bytes)
        self.fd = _anonymous_file(self.num_bytes)
        self._map = mmap.mmap(self.fd, self.num_bytes)
        self.view = memoryview(self._map)
        self._free: list[Region] = [Region(0, self.num_bytes)]
        self._used: set[Region] = set()
        self._waiting: deque[Reservation] = deque()

    @property
    def num_used_bytes(self) -> int:
        """Bytes handed out."""
        return sum(region.num_bytes for region in self._used)

    def reserve(self, num_bytes: int, granted: Callable[[Region], None]) -> Reservation:
        """Call `granted` with a region, at once or when it is this reservation's turn and there is room."""
        reservation = Reservation(aligned(num_bytes), granted)
        self._waiting.append(reservation)
        self._grant()
        return reservation

    def withdraw(self, reservation: Reservation) -> None:
        """Give up waiting; without effect once granted."""
        if reservation in self._waiting:
            self._waiting.remove(reservation)
            self._grant()

    def release(self, region: Region) -> None:
        """Take a region back."""
        self._used.remove(region)
        insort(self._free, region)
        self._merge_around(bisect_left(self._free, region))
        self._grant()

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

    def _grant(self) -> None:
        while self._waiting and (region := self._take(self._waiting[0].num_bytes)) is not None:
            self._waiting.popleft().granted(region)

    def _take(self, num_bytes: int) -> Region | None:
        for index, free in enumerate(self._free):
            if free.num_bytes >= num_bytes:
                region = Region(free.offset, num_bytes)
                rest = Region(region.end, free.num_bytes - num_bytes)
                self._free[index : index + 1] = [rest] if rest.num_bytes else []
                self._used.add(region)
                return region
        return None

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
