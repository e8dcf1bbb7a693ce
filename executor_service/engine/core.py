"""The engine: `schedule -> execute -> sample -> update`, one step at a time."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

from executor_service.engine.messages import Finished, FinishReason, Load, StepReport, TokenLogprobs
from executor_service.engine.model_runner import ItemMismatchError, ModelOutput, ModelRunner
from executor_service.engine.request import Request
from executor_service.engine.scheduler import ScheduledBatch, Scheduler


class Engine:
    """Requests in, tokens out. Not thread-safe: one thread calls everything."""

    def __init__(
        self, scheduler: Scheduler, runner: ModelRunner, eos_token_ids: frozenset[int], check_integrity: bool = False
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.eos_token_ids = eos_token_ids
        self._checks = check_integrity
        self._requests: dict[int, Request] = {}
        self._aborted: list[Request] = []
        self._refused: list[Finished] = []

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work or bool(self._aborted or self._refused)

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
        """Queue a request."""
        self._requests[request.request_id] = request
        self.scheduler.add(request)

    def refuse(self, request_id: int, reason: FinishReason, error: str) -> None:
        """A request that could not even be queued; the next step's report says so."""
        self._refused.append(Finished(request_id, reason, error=error))

    def abort(self, request_ids: Iterable[int]) -> None:
        """End requests now; the next step's report says so. Ids that are not here any more are ignored."""
        for request_id in request_ids:
            if (request := self._requests.get(request_id)) is not None:
                request.finish_reason = FinishReason.ABORTED
                self._aborted.append(self._retire(request))

    def step(self) -> StepReport:
        """One step: its report has every output and every request that ended."""
        began = time.monotonic()
        batch = self.scheduler.schedule()
        output = self.runner.execute(batch)
        finished = self._update(batch, output)
        if self._checks:
            self.check_integrity()
        return self._report(batch, output, finished, began)

    def check_integrity(self) -> None:
        """IntegrityError unless blocks, queues and requests are whole."""
        self.scheduler.check_integrity()

    def _update(self, batch: ScheduledBatch, output: ModelOutput) -> list[Request]:
        """Advance every request of the batch, append its token, and retire those that ended."""
        for scheduled, error in output.failed:
            is_mismatch = isinstance(error, ItemMismatchError)
            scheduled.request.finish_reason = FinishReason.MISMATCHED if is_mismatch else FinishReason.FAILED
            scheduled.request.error = str(error)
        for scheduled in batch.requests:
            if not scheduled.request.is_finished:
                self.scheduler.advance(scheduled.request, scheduled.num_tokens)
        for scheduled, token_id in zip(output.requests, output.sampled.token_ids, strict=True):
            scheduled.request.append(token_id, self.eos_token_ids)
        ended = [scheduled.request for scheduled in batch.requests if scheduled.request.is_finished]
        return [self._retire(request) for request in ended]

    def _retire(self, request: Request) -> Request:
        self.scheduler.remove(request)
        self.runner.sampler.release(request.request_id)
        del self._requests[request.request_id]
        return request

    def _report(self, batch: ScheduledBatch, output: ModelOutput, ended: list[Request], began: float) -> StepReport:
        aborted, self._aborted = self._aborted, []
        refused, self._refused = self._refused, []
        logprobs: list[tuple[int, TokenLogprobs]] = [
            (index, entry) for index, entry in enumerate(output.sampled.logprobs) if entry is not None
        ]
        return StepReport(
            request_ids=[scheduled.request.request_id for scheduled in output.requests],
            token_ids=output.sampled.token_ids,
            logprobs=logprobs,
            finished=[*refused, *(_finished(request) for request in (*aborted, *ended))],
            load=self.load,
            counters=replace(self.scheduler.counters),
            prompt_logprobs=[(request.request_id, entries) for request, entries in output.prompt_logprobs],
            seconds=time.monotonic() - began,
            num_scheduled_requests=len(batch.requests),
            num_scheduled_tokens=batch.num_tokens,
        )


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
