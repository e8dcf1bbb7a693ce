"""Scheduler and block manager under random arrivals, cancels and shortage: nothing leaks, nobody starves."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from executor_service.engine.block_manager import BlockManager, IntegrityError
from executor_service.engine.encoder_cache import EncoderCache
from executor_service.engine.messages import FinishReason, SamplingParams
from executor_service.engine.request import EngineItem, Request
from executor_service.engine.scheduler import Scheduler
from registry import ItemLayout, PlaceholderRange, Run

BLOCK_SIZE, NUM_BLOCKS, MAX_LEN = 4, 20, 80
MAX_SEQS, MAX_TOKENS, MAX_FEATURES = 5, 16, 12


def make_request(number: int, prompt: int, output: int, items: list[tuple[int, int]]) -> Request:
    """`items` are (gap before, length) in tokens."""
    placed, end = [], 0
    for gap, length in items:
        if end + gap + length < prompt:
            layout = ItemLayout((Run(7, length),), {})
            placed.append(EngineItem(PlaceholderRange(end + gap, length), "image", layout, {}))
            end += gap + length
    return Request(number, [1] * prompt, placed, SamplingParams(max_tokens=output), MAX_LEN)


class SchedulerMachine(RuleBasedStateMachine):
    """Steps without a model: what is scheduled counts as computed."""

    def __init__(self) -> None:
        super().__init__()
        blocks = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
        self.scheduler = Scheduler(blocks, EncoderCache(1000), MAX_SEQS, MAX_TOKENS, MAX_FEATURES)
        self.live: dict[int, Request] = {}
        self.num_made = 0

    @rule(
        prompt=st.integers(1, 60),
        output=st.integers(1, 20),
        items=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 15)), max_size=3),
    )
    def arrive(self, prompt: int, output: int, items: list[tuple[int, int]]) -> None:
        request = make_request(self.num_made, prompt, output, items)
        self.num_made += 1
        self.live[request.request_id] = request
        self.scheduler.add(request)

    @rule(index=st.integers(0, 50))
    def cancel(self, index: int) -> None:
        if self.live:
            request = list(self.live.values())[index % len(self.live)]
            del self.live[request.request_id]
            self.scheduler.remove(request)

    @rule()
    def step(self) -> None:
        oldest = self.scheduler.running[0] if self.scheduler.running else None
        batch = self.scheduler.schedule()
        if self.live:
            assert batch.requests, "work but nothing scheduled"
        if oldest is not None:
            assert any(s.request is oldest for s in batch.requests), "the oldest running request made no progress"
        self.check_budgets(batch)
        for scheduled in batch.requests:
            self.advance(scheduled)

    def check_budgets(self, batch) -> None:
        assert batch.num_tokens <= MAX_TOKENS
        features = [item.layout.num_tokens for s in batch.requests for item in s.items]
        assert sum(features) <= MAX_FEATURES or len(features) == 1
        singles = [s.num_tokens == 1 for s in batch.requests]
        assert singles == sorted(singles, reverse=True)
        for scheduled in batch.requests:
            start = scheduled.request.num_computed_tokens
            for item in scheduled.request.items:
                touched = item.placeholder.offset < start + scheduled.num_tokens and item.placeholder.end > start
                assert not touched or item.features is not None or item in scheduled.items

    def advance(self, scheduled) -> None:
        request = scheduled.request
        for item in scheduled.items:
            item.features = object()
        needs_token = scheduled.needs_token
        self.scheduler.advance(request, scheduled.num_tokens)
        if needs_token:
            request.append(3, frozenset())
        if request.is_finished:
            self.scheduler.remove(request)
            del self.live[request.request_id]

    @invariant()
    def whole(self) -> None:
        self.scheduler.check_integrity()

    def teardown(self) -> None:
        """Whatever is left finishes in bounded time."""
        steps = 0
        while self.live:
            self.step()
            steps += 1
            assert steps < 5000, "starvation"
        self.scheduler.check_integrity()
        assert self.scheduler.blocks.num_used_blocks == 0


SchedulerMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
TestScheduler = SchedulerMachine.TestCase


def test_finish_reasons() -> None:
    params = SamplingParams(max_tokens=3, stop_token_ids=frozenset({9}))
    request = Request(0, [1, 2], [], params, MAX_LEN)
    request.append(5, frozenset({8}))
    assert request.finish_reason is None
    request.append(9, frozenset({8}))
    assert request.finish_reason is FinishReason.STOP
    request = Request(0, [1, 2], [], params, 4)
    request.append(5, frozenset())
    request.append(5, frozenset())
    assert request.finish_reason is FinishReason.LENGTH


def test_integrity_check_notices_a_leak_and_a_double_use() -> None:
    blocks = BlockManager(4, 4)
    request = make_request(0, 8, 1, [])
    blocks.reserve(request, 8)
    blocks.check_integrity([request])
    with pytest.raises(IntegrityError, match="KV block 0 has 0 users, 1 are counted"):
        blocks.check_integrity([])
    request.block_table.append(request.block_table[0])
    with pytest.raises(IntegrityError, match="KV block 0 has 2 users, 1 are counted"):
        blocks.check_integrity([request])
