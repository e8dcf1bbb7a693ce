"""The shared arena: never overlapping, never overtaken, always whole."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from executor_service.front.arena import ALIGNMENT, Arena, Region, Reservation

SIZE = 64 * ALIGNMENT


class ArenaMachine(RuleBasedStateMachine):
    """Random reservations, withdrawals and releases."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(SIZE)
        self.regions: list[Region] = []
        self.granted: list[int] = []
        self.asked: list[tuple[int, Reservation]] = []

    def teardown(self) -> None:
        for region in self.regions:
            self.arena.release(region)
        self.arena.close()

    @rule(num_bytes=st.integers(1, SIZE))
    def reserve(self, num_bytes: int) -> None:
        number = len(self.asked)

        def granted(region: Region) -> None:
            assert region.num_bytes >= num_bytes
            self.regions.append(region)
            self.granted.append(number)

        self.asked.append((number, self.arena.reserve(num_bytes, granted)))

    @rule(index=st.integers(0, 100))
    def release(self, index: int) -> None:
        if self.regions:
            self.arena.release(self.regions.pop(index % len(self.regions)))

    @rule(index=st.integers(0, 100))
    def withdraw(self, index: int) -> None:
        if self.asked:
            self.arena.withdraw(self.asked[index % len(self.asked)][1])

    @invariant()
    def whole_and_in_order(self) -> None:
        self.arena.check_integrity()
        assert self.granted == sorted(self.granted)
        ordered = sorted(self.regions)
        assert all(a.end <= b.offset for a, b in pairwise(ordered))
        assert self.arena.num_used_bytes == sum(region.num_bytes for region in self.regions)


ArenaMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestArena = ArenaMachine.TestCase
