"""What runs in the next step: continuous batching with chunked prefill, under four budgets.

Running requests go first, then waiting ones, both by priority and arrival. A step has a budget of tokens and one
of encoder features; KV blocks and the encoder cache are the others. Where blocks run out, the last running
request in that order is preempted and recomputed later. A request that begins shares the longest prefix that is
in the KV cache. Tokens that see each other (`spans`) are computed in one step.
"""

from __future__ import annotations

import time
from bisect import insort
from dataclasses import dataclass, field
from typing import NamedTuple

from executor_service.engine.block_manager import BlockManager, IntegrityError
from executor_service.engine.encoder_cache import EncoderCache
from executor_service.engine.messages import Counters
from executor_service.engine.request import EngineItem, Request


class ScheduledRequest(NamedTuple):
    """`num_tokens` tokens of a request from its `num_computed_tokens`-th on; `items` are to be encoded first."""

    request: Request
    num_tokens: int
    items: tuple[EngineItem, ...] = ()

    @property
    def needs_token(self) -> bool:
        """Whether this step computes the request's last token, so that the next one can be sampled."""
        return self.num_tokens == self.request.num_pending_tokens

    @property
    def is_behind_items(self) -> bool:
        """Whether no token of the chunk belongs to an item."""
        return self.request.num_computed_tokens >= self.request.items_end


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
        self,
        blocks: BlockManager,
        encoder_cache: EncoderCache,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_num_encoder_tokens: int,
    ) -> None:
        self.blocks = blocks
        self.encoder_cache = encoder_cache
        self.counters = Counters()
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
        """Take a request out, wherever it is, and free its blocks and features."""
        queue = self.running if request in self.running else self.waiting
        queue.remove(request)
        self._release(request)

    def advance(self, request: Request, num_tokens: int) -> None:
        """Count a chunk as computed, or enqueued: full blocks may be shared, features behind it are not needed.

        Whoever comes after on the device finds it computed.
        """
        start = request.num_computed_tokens
        request.num_computed_tokens += num_tokens
        self.blocks.register(request)
        for item in request.items_between(start, request.num_computed_tokens):
            if item.placeholder.end <= request.num_computed_tokens:
                self.encoder_cache.release(item)

    def schedule(self) -> ScheduledBatch:
        """The next step's batch; empty only if there is no work, or all of it awaits tokens that are in flight."""
        batch = ScheduledBatch()
        budget = _Budget(self.max_num_batched_tokens, self.max_num_encoder_tokens, self.encoder_cache)
        self._schedule_running(batch, budget)
        if not batch.num_preempted:
            self._admit_waiting(batch, budget)
        batch.requests.sort(key=lambda scheduled: scheduled.num_tokens > 1)
        return batch

    def _schedule_running(self, batch: ScheduledBatch, budget: _Budget) -> None:
        index = 0
        while index < len(self.running) and budget.tokens:
            request = self.running[index]
            num_tokens = budget.fit(request)
            if num_tokens and not self._reserve(request, num_tokens, batch):
                continue  # the request itself was preempted; another one stands at its place now, or none
            if num_tokens:
                batch.requests.append(self._take(request, num_tokens, budget))
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
        self._release(request)
        request.reset_progress()
        self.counters.num_preemptions += 1
        self.add(request)

    def _release(self, request: Request) -> None:
        self.blocks.free(request)
        for item in request.items:
            self.encoder_cache.release(item)

    def _admit_waiting(self, batch: ScheduledBatch, budget: _Budget) -> None:
        while self.waiting and budget.tokens and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            request.num_computed_tokens = self.blocks.share_prefix(request)
            num_tokens = budget.fit(request)
            if not num_tokens or not self.blocks.reserve(request, request.num_computed_tokens + num_tokens):
                self.blocks.free(request)
                request.num_computed_tokens = 0
                return
            self.waiting.pop(0)
            insort(self.running, request, key=_queue_order)
            self._note_begin(request)
            batch.requests.append(self._take(request, num_tokens, budget))

    def _note_begin(self, request: Request) -> None:
        if request.first_scheduled is None:
            request.first_scheduled = time.monotonic()
            request.num_cached_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
            self.counters.num_prompt_tokens += request.num_prompt_tokens
            self.counters.num_cached_tokens += request.num_cached_tokens

    def _take(self, request: Request, num_tokens: int, budget: _Budget) -> ScheduledRequest:
        """Spend the chunk, pin the features it needs, and note what is to be encoded for them."""
        start = request.num_computed_tokens
        reached = request.items_between(start, start + num_tokens)
        if not reached:
            budget.tokens -= num_tokens
            return ScheduledRequest(request, num_tokens)
        items = list[EngineItem]()
        needed = [item for item in reached if not item.encoded.num_users]
        # Those that are there first: making room for the others must not drop them.
        for item in sorted(needed, key=lambda item: self.encoder_cache.find(item) is None):
            if self.encoder_cache.acquire(item):
                items.append(item)
                self.counters.num_encoded_items += 1
            else:
                self.counters.num_encoder_cache_hits += 1
        budget.take(num_tokens, items)
        return ScheduledRequest(request, num_tokens, tuple(items))

    def check_integrity(self) -> None:
        """IntegrityError unless blocks and queues are whole."""
        everyone = [*self.waiting, *self.running]
        self.blocks.check_integrity(everyone)
        self.encoder_cache.check_integrity(item for request in everyone for item in request.items)
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
    cache: EncoderCache
    _encoded: bool = False

    def fit(self, request: Request) -> int:
        """How many tokens of the request fit: up to the first item that cannot be encoded, or span that is cut."""
        if request.num_inflight_tokens and request.awaits_tokens:
            return 0
        start = request.num_computed_tokens
        num_tokens = min(request.num_pending_tokens, self.tokens)
        items = request.items_between(start, start + num_tokens)
        if not items:
            return num_tokens
        fresh = pinned = 0
        seen: set[bytes] = set()
        for item in items:
            if item.encoded.num_users or item.content_digest in seen:
                continue
            entry = self.cache.find(item)
            if entry is None:
                fresh += item.layout.num_tokens
            if entry is None or not entry.num_users:
                pinned += item.layout.num_tokens
            only = not self._encoded and fresh == item.layout.num_tokens
            if (fresh > self.features and not only) or pinned > self.cache.room:
                return max(item.placeholder.offset - start, 0)
            if item.content_digest is not None:
                seen.add(item.content_digest)
        return request.without_cut(num_tokens)

    def take(self, num_tokens: int, items: list[EngineItem]) -> None:
        """Spend a chunk and the items encoded for it."""
        self.tokens -= num_tokens
        self.features -= sum(item.layout.num_tokens for item in items)
        self._encoded = self._encoded or bool(items)
