"""The shared arena: never overlapping, always whole."""

from __future__ import annotations

import os
import sys
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from executor_service.front.arena import ALIGNMENT, TOUCHED_AHEAD, TOUCHED_AT_ONCE, Arena, Region, aligned

SIZE = 64 * ALIGNMENT


class ArenaMachine(RuleBasedStateMachine):
    """Regions taken and released at random."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(SIZE)
        self.regions: list[Region] = []

    def teardown(self) -> None:
        for region in self.regions:
            self.arena.release(region)
        assert self.arena.take(SIZE) == Region(0, SIZE)
        self.arena.release(Region(0, SIZE))
        self.arena.close()

    @rule(num_bytes=st.integers(0, SIZE))
    def take(self, num_bytes: int) -> None:
        region = self.arena.take(num_bytes)
        if region is None:
            assert not self.largest_gap() >= aligned(num_bytes)
        else:
            assert region.num_bytes == aligned(num_bytes)
            self.regions.append(region)

    @rule(index=st.integers(0, 100))
    def release(self, index: int) -> None:
        if self.regions:
            self.arena.release(self.regions.pop(index % len(self.regions)))

    def largest_gap(self) -> int:
        edges = [0, *(edge for region in self.real() for edge in (region.offset, region.end)), SIZE]
        return max(end - begin for begin, end in zip(edges[::2], edges[1::2], strict=True))

    def real(self) -> list[Region]:
        return sorted(region for region in self.regions if region.num_bytes)

    @invariant()
    def whole(self) -> None:
        self.arena.check_integrity()
        assert all(a.end <= b.offset for a, b in pairwise(self.real()))
        assert self.arena.num_used_bytes == sum(region.num_bytes for region in self.regions)


def num_resident_bytes(arena: Arena) -> int:
    return os.fstat(arena.fd).st_blocks * 512


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere files count other blocks")
def test_memory_is_there_before_it_is_handed_out() -> None:
    arena = Arena(4 * TOUCHED_AHEAD)
    assert num_resident_bytes(arena) == TOUCHED_AHEAD
    region = arena.take(TOUCHED_AT_ONCE + 1)
    assert region is not None
    assert num_resident_bytes(arena) == TOUCHED_AHEAD, "nobody waits for it while it is taken"
    assert arena.touch_ahead()
    assert num_resident_bytes(arena) == TOUCHED_AHEAD + TOUCHED_AT_ONCE
    while arena.touch_ahead():
        pass
    assert num_resident_bytes(arena) >= region.end + TOUCHED_AHEAD
    assert num_resident_bytes(arena) < region.end + TOUCHED_AHEAD + (1 << 16), "no more than is asked for"
    arena.release(region)
    assert arena.take(region.num_bytes) == region
    assert not arena.touch_ahead(), "it has been used before"
    arena.close()


def test_touching_leaves_what_is_there() -> None:
    """Also where a region reaches beyond what was touched, and to the arena's end."""
    arena = Arena(TOUCHED_AHEAD + 3 * TOUCHED_AT_ONCE + ALIGNMENT)
    for num_bytes in (
        ALIGNMENT,
        TOUCHED_AHEAD + TOUCHED_AT_ONCE,
        arena.num_bytes - TOUCHED_AHEAD - TOUCHED_AT_ONCE - ALIGNMENT,
    ):
        region = arena.take(num_bytes)
        assert region is not None
        arena.view[region.offset : region.end] = b"\x01" * region.num_bytes
        while arena.touch_ahead():
            pass
    assert bytes(arena.view) == b"\x01" * arena.num_bytes
    arena.close()


ArenaMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestArena = ArenaMachine.TestCase
