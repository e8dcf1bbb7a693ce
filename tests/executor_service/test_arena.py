"""The shared arena: never overlapping, always whole."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from executor_service.front.arena import ALIGNMENT, Arena, Region, aligned

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


ArenaMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestArena = ArenaMachine.TestCase
