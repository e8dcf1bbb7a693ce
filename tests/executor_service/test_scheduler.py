"""Scheduler, block manager and encoder cache under random arrivals, cancels and shortage.

The machine keeps a model of the KV cache's content: what was written to each slot is everything that the slot's key
and value would depend on. So a block that is shared wrongly, used twice or recycled too early shows as a wrong read.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from executor_service.engine.block_manager import BlockManager, IntegrityError
from executor_service.engine.encoder_cache import EncoderCache
from executor_service.engine.messages import FinishReason, SamplingParams
from executor_service.engine.request import EngineItem, Request
from executor_service.engine.scheduler import ScheduledBatch, ScheduledRequest, Scheduler
from registry import ItemLayout, PlaceholderRange, Run

BLOCK_SIZE, NUM_BLOCKS, MAX_LEN = 4, 20, 80
MAX_SEQS, MAX_TOKENS, MAX_FEATURES = 5, 16, 12
CONTENTS = {"cat": 3, "dog": 9, "elk": 14, "fox": 9, None: 5}
"""Feature tokens of each content; None: an item without a digest."""
FEATURE_ID = 99


def make_request(
    number: int,
    prompt: int,
    output: int,
    contents: list[str | None],
    variant: int = 0,
    priority: int = 0,
    has_spans: bool = False,
) -> Request:
    """Prompts of one variant begin alike; items stand behind each other from token 5 on, while they fit.

    With spans an item's tokens see each other, all but its last.
    """
    token_ids = [index % 3 + 10 * (variant if index > 9 else 0) for index in range(prompt)]
    items, at = [], 5
    for content in contents:
        length = CONTENTS[content]
        if at + length < prompt:
            digest = None if content is None else hashlib.sha256(content.encode()).digest()
            layout = ItemLayout((Run(FEATURE_ID, length),), {})
            items.append(EngineItem(PlaceholderRange(at, length), "image", layout, {}, content_digest=digest))
            token_ids[at : at + length] = [FEATURE_ID] * length
            at += length + 2
    request = Request(number, token_ids, items, SamplingParams(max_tokens=output), MAX_LEN, priority)
    if has_spans:
        request.spans = [(item.placeholder.offset, item.placeholder.end - 1) for item in items]
    return request


def extend_dependencies(found: list[bytes], request: Request, end: int) -> None:
    """What the key and value of each of the first `end` tokens depend on; `found` are those known already."""
    for index in range(len(found), end):
        hasher = hashlib.sha256(found[-1] if found else b"")
        token_id = int(request.token_ids[index]) if index < request.num_tokens else next_token(request)
        hasher.update(token_id.to_bytes(8, "little"))
        for item in request.items_between(index, index + 1):
            hasher.update(item.content_digest or f"private to {request.request_id}".encode())
            hasher.update(bytes([index - item.placeholder.offset]))
        for first, last in request.spans_between(index, index + 1):
            hasher.update(f"sees {first} to {last}".encode())
        found.append(hasher.digest())


def next_token(request: Request) -> int:
    """What the model answers: always the same to one request."""
    return 3 + request.request_id % 2


class SchedulerMachine(RuleBasedStateMachine):
    """Steps without a model: what is scheduled is checked, and then counts as computed.

    Where it runs ahead, a step's tokens are known after the next has been scheduled, as in the engine.
    """

    @initialize(capacity=st.integers(14, 40), shares=st.booleans(), runs_ahead=st.booleans())
    def boot(self, capacity: int, shares: bool, runs_ahead: bool) -> None:
        self.runs_ahead = runs_ahead
        self.in_flight: list[Request] = []
        blocks = BlockManager(NUM_BLOCKS, BLOCK_SIZE, shares)
        self.scheduler = Scheduler(blocks, EncoderCache(capacity), MAX_SEQS, MAX_TOKENS, MAX_FEATURES)
        self.live: dict[int, Request] = {}
        self.slots: dict[int, bytes] = {}
        self.depends: defaultdict[int, list[bytes]] = defaultdict(list)
        self.num_made = 0

    @rule(
        prompt=st.integers(1, 60),
        output=st.integers(1, 20),
        contents=st.lists(st.sampled_from(list(CONTENTS)), max_size=3),
        variant=st.integers(0, 2),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        has_spans=st.booleans(),
    )
    def arrive(
        self, prompt: int, output: int, contents: list[str | None], variant: int, priority: int, has_spans: bool
    ) -> None:
        request = make_request(self.num_made, prompt, output, contents, variant, priority, has_spans)
        self.num_made += 1
        self.live[request.request_id] = request
        self.scheduler.add(request)

    @rule(index=st.integers(0, 50))
    def cancel(self, index: int) -> None:
        if self.live:
            request = list(self.live.values())[index % len(self.live)]
            del self.live[request.request_id]
            self.scheduler.remove(request)

    @rule(num_steps=st.integers(1, 5))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            batch = self.scheduler.schedule()
            if self.live:
                assert batch.requests or self.in_flight, "work but nothing scheduled"
            self.check_budgets(batch)
            for scheduled in batch.requests:
                self.encode(scheduled)
            sampled = [scheduled.request for scheduled in batch.requests if scheduled.needs_token]
            for scheduled in batch.requests:
                self.compute(scheduled)
            for request in sampled:
                assert not request.awaits_tokens
                request.num_inflight_tokens += 1
            if self.runs_ahead:
                sampled, self.in_flight = self.in_flight, sampled
            for request in sampled:
                self.resolve(request)

    def check_budgets(self, batch: ScheduledBatch) -> None:
        assert batch.num_tokens <= MAX_TOKENS
        features = [item.layout.num_tokens for s in batch.requests for item in s.items]
        assert sum(features) <= MAX_FEATURES or len(features) == 1
        singles = [s.num_tokens == 1 for s in batch.requests]
        assert singles == sorted(singles, reverse=True)
        assert len({s.request.request_id for s in batch.requests}) == len(batch.requests)

    def encode(self, scheduled: ScheduledRequest) -> None:
        for item in scheduled.items:
            assert item.features is None, "encoded twice"
            item.features = item.content_digest

    def compute(self, scheduled: ScheduledRequest) -> None:
        """Read what the request stands on, and write what it computes."""
        request, start = scheduled.request, scheduled.request.num_computed_tokens
        end = start + scheduled.num_tokens
        for item in request.items_between(start, end):
            assert item.encoded.num_users
            assert item.features == item.content_digest
        assert not any(last > end for _, last in request.spans_between(start, end)), "a span is cut"
        expected = self.depends[request.request_id]
        extend_dependencies(expected, request, end)
        places = [request.block_table[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in range(end)]
        assert [self.slots[place] for place in places[:start]] == expected[:start]
        for place, value in zip(places[start:], expected[start:end], strict=True):
            self.slots[place] = value
        self.scheduler.advance(request, scheduled.num_tokens)

    def resolve(self, request: Request) -> None:
        """The request's token is known, unless it was cancelled; every seventh ends its answer early."""
        if self.live.get(request.request_id) is not request or request.is_finished:
            return
        ends = frozenset({next_token(request)}) if request.request_id % 7 == 6 else frozenset()
        request.append(next_token(request), ends)
        if request.is_finished:
            self.scheduler.remove(request)
            del self.live[request.request_id]
        else:
            self.scheduler.blocks.register(request)

    @invariant()
    def whole(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()

    @invariant()
    def in_order(self) -> None:
        """Nobody runs while a more urgent request has waited for longer than it has run."""
        if hasattr(self, "scheduler"):
            keys = [(-request.priority, request.arrived) for request in self.scheduler.running]
            assert keys == sorted(keys)

    def teardown(self) -> None:
        """Whatever is left finishes in bounded time, and then nothing is in use."""
        if not hasattr(self, "scheduler"):
            return
        steps = 0
        while self.live:
            self.step(1)
            steps += 1
            assert steps < 5000, "starvation"
        self.scheduler.check_integrity()
        assert self.scheduler.blocks.num_used_blocks == 0
        assert self.scheduler.encoder_cache.room == self.scheduler.encoder_cache.capacity


SchedulerMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestScheduler = SchedulerMachine.TestCase


def run_to_the_end(scheduler: Scheduler, most: int) -> list[int]:
    """Request ids in the order in which they finish, within `most` steps."""
    finished = []
    for _ in range(most):
        if not scheduler.has_work:
            break
        for scheduled in scheduler.schedule().requests:
            for item in scheduled.items:
                item.features = item.content_digest
            needs_token = scheduled.needs_token
            scheduler.advance(scheduled.request, scheduled.num_tokens)
            if needs_token:
                scheduled.request.append(3, frozenset())
            if scheduled.request.is_finished:
                scheduler.remove(scheduled.request)
                finished.append(scheduled.request.request_id)
    assert not scheduler.has_work
    return finished


def make_scheduler(num_blocks: int = NUM_BLOCKS, max_num_seqs: int = MAX_SEQS, capacity: int = 100) -> Scheduler:
    blocks = BlockManager(num_blocks, BLOCK_SIZE)
    return Scheduler(blocks, EncoderCache(capacity), max_num_seqs, MAX_TOKENS, MAX_FEATURES)


def test_a_stream_of_newcomers_does_not_starve_the_oldest() -> None:
    """Every step brings a request; blocks suffice for two of them; still each ends in the order it came."""
    scheduler = make_scheduler(num_blocks=20)
    finished: list[int] = []
    for number in range(200):
        scheduler.add(make_request(number, 30, 8, [], variant=number % 3))
        if number % 8 == 0:
            finished += _one_step(scheduler)
    assert finished == sorted(finished)
    finished += run_to_the_end(scheduler, 3000)
    assert finished == list(range(200))


def _one_step(scheduler: Scheduler) -> list[int]:
    finished = []
    for scheduled in scheduler.schedule().requests:
        needs_token = scheduled.needs_token
        scheduler.advance(scheduled.request, scheduled.num_tokens)
        if needs_token:
            scheduled.request.append(3, frozenset())
        if scheduled.request.is_finished:
            scheduler.remove(scheduled.request)
            finished.append(scheduled.request.request_id)
    return finished


def test_the_least_urgent_is_preempted() -> None:
    scheduler = make_scheduler(num_blocks=20, max_num_seqs=3)
    requests = [make_request(number, 20, 20, [], number, priority) for number, priority in enumerate((0, -1, 1))]
    for request in requests:
        scheduler.add(request)
    assert run_to_the_end(scheduler, 500)[-1] == 1
    assert [request.num_preemptions > 0 for request in requests] == [False, True, False]


@pytest.mark.parametrize("has_spans", [False, True])
def test_two_large_items_take_turns_in_a_small_cache(has_spans: bool) -> None:
    """Room for one: nobody waits for somebody who waits for him."""
    scheduler = make_scheduler(num_blocks=60, capacity=14)
    for number in range(6):
        contents = ["elk", "dog"] if number % 2 else ["fox", "elk"]
        scheduler.add(make_request(number, 40, 3, contents, number % 3, has_spans=has_spans))
    assert sorted(run_to_the_end(scheduler, 300)) == list(range(6))


def test_nobody_begins_in_a_step_that_preempts() -> None:
    """The victim would take back what it gave up; and to be scheduled again is no second beginning."""
    scheduler = make_scheduler(num_blocks=8)
    requests = [make_request(number, 12, 20, [], variant=number) for number in range(2)]
    for request in requests:
        scheduler.add(request)
    batch = scheduler.schedule()
    while not batch.num_preempted:
        for scheduled in batch.requests:
            needs_token = scheduled.needs_token
            scheduler.advance(scheduled.request, scheduled.num_tokens)
            if needs_token:
                scheduled.request.append(3, frozenset())
        batch = scheduler.schedule()
    assert [scheduled.request for scheduled in batch.requests] == requests[:1]
    assert scheduler.waiting == requests[1:]
    begun, counted = requests[1].first_scheduled, scheduler.counters.num_prompt_tokens
    for scheduled in batch.requests:
        scheduler.advance(scheduled.request, scheduled.num_tokens)
        scheduled.request.append(3, frozenset())
    run_to_the_end(scheduler, 200)
    assert (requests[1].first_scheduled, scheduler.counters.num_prompt_tokens) == (begun, counted)
    assert counted == 24


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
