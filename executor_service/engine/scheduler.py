"""What runs in the next step: continuous batching with chunked prefill, under three budgets.

Running requests go first, oldest first; then waiting ones, by priority and arrival. A step has a budget
of tokens and one of encoder features; blocks are the third. Where blocks run out, the youngest running
request is preempted and recomputed later.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from executor_service.engine.block_manager import BlockManager, IntegrityError
from executor_service.engine.request import EngineItem, Request


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """`num_tokens` tokens of a request from its `num_computed_tokens`-th on; `items` are to be encoded first."""

    request: Request
    num_tokens: int
    items: tuple[EngineItem, ...] = ()

    @property
    def needs_token(self) -> bool:
        """Whether this step computes the request's last token, so that the next one can be sampled."""
        return self.num_tokens == self.request.num_pending_tokens


@dataclass
class ScheduledBatch:
    """One step's work; single-token requests first, as the attention kernels want them."""

    requests: list[ScheduledRequest] = field(default_factory=list)
    num_preempted: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens in the batch."""
        return sum(scheduled.num_tokens for scheduled in self.requests)


class Scheduler:
    """Queues of waiting and running requests.

    `max_num_encoder_tokens` bounds the encoder features of one step; one item always fits.
    """

    def __init__(
        self, blocks: BlockManager, max_num_seqs: int, max_num_batched_tokens: int, max_num_encoder_tokens: int
    ) -> None:
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_encoder_tokens = max_num_encoder_tokens
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a request behind its priority's others."""
        insort(self.waiting, request, key=_queue_order)

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it is, and free its blocks."""
        queue = self.running if request in self.running else self.waiting
        queue.remove(request)
        self.blocks.free(request)

    def schedule(self) -> ScheduledBatch:
        """The next step's batch; empty only if there is no work."""
        batch = ScheduledBatch()
        budget = _Budget(self.max_num_batched_tokens, self.max_num_encoder_tokens)
        self._schedule_running(batch, budget)
        if not batch.num_preempted:
            self._admit_waiting(batch, budget)
        batch.requests.sort(key=lambda scheduled: scheduled.num_tokens > 1)
        return batch

    def _schedule_running(self, batch: ScheduledBatch, budget: _Budget) -> None:
        index = 0
        while index < len(self.running) and budget.tokens:
            request = self.running[index]
            num_tokens, items = budget.fit(request)
            if num_tokens and not self._reserve(request, num_tokens, batch):
                continue  # the request itself was preempted; another one stands at its place now, or none
            if num_tokens:
                batch.requests.append(budget.take(request, num_tokens, items))
            index += 1

    def _reserve(self, request: Request, num_tokens: int, batch: ScheduledBatch) -> bool:
        """Blocks for the chunk, by preempting younger requests if need be; False if the request had to go itself."""
        while not self.blocks.reserve(request, request.num_computed_tokens + num_tokens):
            victim = self.running.pop()
            self._preempt(victim)
            batch.num_preempted += 1
            self.num_preemptions += 1
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        self.blocks.free(request)
        request.reset_progress()
        self.add(request)

    def _admit_waiting(self, batch: ScheduledBatch, budget: _Budget) -> None:
        while self.waiting and budget.tokens and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            num_tokens, items = budget.fit(request)
            if not num_tokens or not self.blocks.reserve(request, num_tokens):
                return
            self.waiting.pop(0)
            self.running.append(request)
            if request.first_scheduled is None:
                request.first_scheduled = time.monotonic()
            batch.requests.append(budget.take(request, num_tokens, items))

    def check_integrity(self) -> None:
        """IntegrityError unless blocks and queues are whole."""
        everyone = [*self.waiting, *self.running]
        self.blocks.check_integrity(everyone)
        if len({request.request_id for request in everyone}) != len(everyone):
            raise IntegrityError("a request is queued twice")
        if len(self.running) > self.max_num_seqs:
            raise IntegrityError(f"{len(self.running)} requests run, max_num_seqs is {self.max_num_seqs}")
        if any(request.block_table for request in self.waiting):
            raise IntegrityError("a waiting request holds blocks")
        if not everyone and self.blocks.num_used_blocks:
            raise IntegrityError(f"{self.blocks.num_used_blocks} blocks are in use by nobody")


def _queue_order(request: Request) -> tuple[int, float, int]:
    return -request.priority, request.arrived, request.request_id


@dataclass
class _Budget:
    """What is left of a step's tokens and encoder features."""

    tokens: int
    features: int
    _encoded: bool = False

    def fit(self, request: Request) -> tuple[int, tuple[EngineItem, ...]]:
        """How many tokens of the request fit, and which items they need encoded; (0, ()) if none do."""
        start = request.num_computed_tokens
        num_tokens = min(request.num_pending_tokens, self.tokens)
        items: list[EngineItem] = []
        features = 0
        for item in _items_to_encode(request, start, start + num_tokens):
            features += item.layout.num_tokens
            first = not self._encoded and not items
            if features > self.features and not first:
                return max(item.placeholder.offset - start, 0), tuple(items)
            items.append(item)
        return num_tokens, tuple(items)

    def take(self, request: Request, num_tokens: int, items: tuple[EngineItem, ...]) -> ScheduledRequest:
        """Spend the chunk."""
        self.tokens -= num_tokens
        self.features -= sum(item.layout.num_tokens for item in items)
        self._encoded = self._encoded or bool(items)
        return ScheduledRequest(request, num_tokens, items)


def _items_to_encode(request: Request, start: int, end: int) -> Iterator[EngineItem]:
    """Items without features whose range overlaps tokens `start` to `end`."""
    for item in request.items:
        overlaps = item.placeholder.offset < end and item.placeholder.end > start
        if overlaps and item.features is None:
            yield item
