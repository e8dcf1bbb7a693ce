"""The engine: `schedule -> execute -> sample -> update`, one step at a time.

Where the device is one of its own, the engine runs ahead: it enqueues a step before it looks at the tokens of the one
before, so that the device never waits for the host. A request that turns out to have ended in between has computed a
token too many, which nobody sees.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from executor_service.engine.item_encoder import ItemMismatchError
from executor_service.engine.messages import (
    Finished,
    FinishReason,
    Load,
    StepEnd,
    StepReport,
    StepTokens,
    TokenLogprobs,
)
from executor_service.engine.model_runner import ModelOutput, ModelRunner
from executor_service.engine.request import Request
from executor_service.engine.scheduler import ScheduledBatch, Scheduler

Token = tuple[Request, int, TokenLogprobs | None]
"""A request's new token, and its log probabilities where they are asked for."""


@dataclass
class Step:
    """A batch that was executed, or enqueued, and who has ended by then: reported when its tokens are known."""

    batch: ScheduledBatch
    output: ModelOutput
    ended: list[Request] = field(default_factory=list)


class Engine:
    """Requests in, tokens out. Not thread-safe: one thread calls everything.

    `runs_ahead`: a step's report is the one before's. `check_integrity` proves the resources after every step.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        eos_token_ids: frozenset[int],
        check_integrity: bool = False,
        runs_ahead: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.eos_token_ids = eos_token_ids
        self.runs_ahead = runs_ahead
        self._checks = check_integrity
        self._requests: dict[int, Request] = {}
        self._in_flight: Step | None = None
        self._aborted: list[Request] = []
        self._refused: list[Finished] = []

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work or bool(self._in_flight or self._aborted or self._refused)

    @property
    def load(self) -> Load:
        """Requests and blocks right now."""
        scheduler, blocks = self.scheduler, self.scheduler.blocks
        return Load(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_used_blocks=blocks.num_used_blocks,
            num_blocks=blocks.num_blocks,
            num_preemptions=scheduler.num_preemptions,
        )

    def add(self, request: Request) -> None:
        """Queue a request; what a plugin says of its spans may be wrong, which is that request's end alone."""
        try:
            request.spans = self.runner.bidirectional_spans(request.items)
        except Exception as error:
            reason = FinishReason.FAILED if all(item.is_attested for item in request.items) else FinishReason.MISMATCHED
            self.refuse(request.request_id, reason, f"bidirectional_spans: {type(error).__name__}: {error}")
            return
        self._requests[request.request_id] = request
        self.scheduler.add(request)

    def refuse(self, request_id: int, reason: FinishReason, error: str) -> None:
        """A request that could not even be queued; the next step's report says so."""
        self._refused.append(Finished(request_id, reason, error=error))

    def abort(self, request_ids: Iterable[int]) -> None:
        """End requests now; the next step's report says so, when nothing on the device uses their tensors any more.

        Ids that are not here any more are ignored.
        """
        for request_id in request_ids:
            if (request := self._requests.get(request_id)) is not None:
                request.finish_reason = FinishReason.ABORTED
                self._aborted.append(self._retire(request))

    def step(self) -> StepReport:
        """One step: its report has every output and every request that ended."""
        began = time.monotonic()
        step = self._execute(self.scheduler.schedule())
        if self.runs_ahead:
            step, self._in_flight = self._in_flight, step
        tokens = [] if step is None else self._update(step)
        if self._checks:
            self.check_integrity()
        return self._report(step, tokens, began)

    def check_integrity(self) -> None:
        """IntegrityError unless blocks, queues and requests are whole."""
        self.scheduler.check_integrity()

    def _execute(self, batch: ScheduledBatch) -> Step | None:
        """Execute the batch, sampling included, and count what it computes; None: there is nothing to do."""
        if not batch.requests:
            return None
        step = Step(batch, self.runner.execute(batch))
        for scheduled, error in step.output.failed:
            is_mismatch = isinstance(error, ItemMismatchError)
            scheduled.request.finish_reason = FinishReason.MISMATCHED if is_mismatch else FinishReason.FAILED
            scheduled.request.error = str(error)
            step.ended.append(self._retire(scheduled.request))
        for scheduled in batch.requests:
            if not scheduled.request.is_finished:
                self.scheduler.advance(scheduled.request, scheduled.num_tokens)
        for scheduled in step.output.requests:
            scheduled.request.num_inflight_tokens += 1
        return step

    def _update(self, step: Step) -> list[Token]:
        """Wait for the step; append its tokens and retire the requests that they end."""
        sampled, tokens = step.output.sampled.result(), list[Token]()
        for scheduled, token_id, logprobs in zip(
            step.output.requests, sampled.token_ids, sampled.logprobs, strict=True
        ):
            request = scheduled.request
            if request.is_finished:
                continue  # by its token before this one, or aborted since
            tokens.append((request, token_id, logprobs))
            self._append(step, request, token_id)
        return tokens

    def _append(self, step: Step, request: Request, token_id: int) -> None:
        request.append(token_id, self.eos_token_ids)
        if request.is_finished:
            step.ended.append(self._retire(request))
        else:
            self.scheduler.blocks.register(request)

    def _retire(self, request: Request) -> Request:
        self.scheduler.remove(request)
        self.runner.sampler.release(request.request_id)
        del self._requests[request.request_id]
        return request

    def _report(self, step: Step | None, tokens: list[Token], began: float) -> StepReport:
        ended, self._aborted = self._aborted, []
        refused, self._refused = self._refused, []
        if step is not None:
            ended = [*ended, *step.ended]
        given = StepTokens(
            request_ids=[request.request_id for request, _, _ in tokens],
            token_ids=[token_id for _, token_id, _ in tokens],
            logprobs=[(index, entry) for index, (_, _, entry) in enumerate(tokens) if entry is not None],
            prompt_logprobs=[] if step is None else _prompt_logprobs(step),
        )
        end = StepEnd(
            finished=[*refused, *(_finished(request) for request in ended)],
            load=self.load,
            counters=replace(self.scheduler.counters),
            num_tokens=len(tokens),
            seconds=time.monotonic() - began,
            num_scheduled_requests=0 if step is None else len(step.batch.requests),
            num_scheduled_tokens=0 if step is None else step.batch.num_tokens,
        )
        return StepReport(given, end)


def _prompt_logprobs(step: Step) -> list[tuple[int, list[TokenLogprobs]]]:
    return [(request.request_id, entries) for request, entries in step.output.prompt_logprobs]


def _finished(request: Request) -> Finished:
    assert request.finish_reason is not None
    scheduled, first, now = request.first_scheduled, request.first_token, time.monotonic()
    return Finished(
        request_id=request.request_id,
        reason=request.finish_reason,
        num_cached_tokens=request.num_cached_tokens,
        queue_seconds=None if scheduled is None else scheduled - request.arrived,
        prefill_seconds=None if first is None or scheduled is None else first - scheduled,
        generate_seconds=None if first is None else now - first,
        error=request.error,
        arrived=request.arrived,
        encode_began=request.encode_began,
        encode_ended=request.encode_ended,
    )
