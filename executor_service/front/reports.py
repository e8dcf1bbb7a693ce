"""What the executor reports of its requests: one span each, with the stages the engine tells of, and metrics.

Most numbers are known anyway and read only when somebody looks.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final

from diptych.service.errors import DiptychError, InternalError
from diptych.service.telemetry import RequestSpan, Telemetry
from diptych.service.telemetry import metrics as catalogue
from diptych.v1 import executor_pb2
from executor_service.engine.messages import Finished, StepEnd
from executor_service.front.request import FrontRequest

if TYPE_CHECKING:
    from executor_service.front.front import Front

LOG = logging.getLogger("diptych.executor")
METHOD: Final = "Execute"
SPAN_NAME: Final = f"diptych.v1.ExecutorService/{METHOD}"


class FrontReports:
    """All of it runs in the front's event loop, but for what `observe` is given."""

    def __init__(self, telemetry: Telemetry, front: Front) -> None:
        self._telemetry = telemetry
        self._front = front
        self._num_output_tokens = 0
        self._step_seconds = telemetry.histogram(catalogue.STEP_DURATION)
        self._batch_requests = telemetry.histogram(catalogue.BATCH_REQUESTS)
        self._batch_tokens = telemetry.histogram(catalogue.BATCH_TOKENS)
        self._observe_engine()
        self._observe_items()

    # --- requests ---------------------------------------------------------------------------------

    def begin(self, start: executor_pb2.Start) -> RequestSpan:
        """A Start has arrived."""
        span = RequestSpan(self._telemetry, SPAN_NAME, start.traceparent, start.tracestate)
        if span.is_recording:
            span.annotate(
                {
                    "rpc.system": "grpc",
                    "diptych.request_id": start.request_id,
                    "diptych.media_items": len(start.items),
                    "gen_ai.usage.input_tokens": len(start.prompt_token_ids),
                }
            )
        return span

    def refuse(self, span: RequestSpan, error: Exception) -> None:
        """The Start was not admitted."""
        typed = error if isinstance(error, DiptychError) else InternalError("unexpected error", stage="admit")
        self._end(span, typed)

    def end(self, request: FrontRequest, finished: Finished | None) -> None:
        """A request has ended; `finished` is what the engine says of it, None: it did not come to that."""
        self._add_stages(request, finished, time.monotonic())
        if request.span.is_recording:
            request.span.annotate({"gen_ai.usage.output_tokens": request.num_output_tokens})
            if finished is not None:
                request.span.annotate({"gen_ai.usage.cache_read.input_tokens": finished.num_cached_tokens})
        with request.span.active():
            _log_end(request)
        self._end(request.span, request.error)

    def _end(self, span: RequestSpan, error: DiptychError | None) -> None:
        span.end(error, error.stage if error else "")
        self._telemetry.count_request(METHOD, error.code.name if error else "OK")

    def _add_stages(self, request: FrontRequest, finished: Finished | None, now: float) -> None:
        if not self._telemetry.is_on:
            return
        if request.admitted.items:
            request.span.add_stage("receive", request.started, request.received or now)
        if request.received is not None and finished is not None:
            _add_engine_stages(request.span, request.received, finished, now)

    # --- steps ------------------------------------------------------------------------------------

    def step(self, end: StepEnd) -> None:
        """The engine has done a step."""
        self._num_output_tokens += end.num_tokens
        if self._telemetry.has_metrics:
            self._step_seconds.record(end.seconds)
            self._batch_requests.record(end.num_scheduled_requests)
            self._batch_tokens.record(end.num_scheduled_tokens)

    # --- what is read when somebody looks -----------------------------------------------------------

    def _observe_engine(self) -> None:
        front, observe = self._front, self._telemetry.observe
        observe(
            catalogue.ENGINE_REQUESTS,
            lambda: [
                (front.num_receiving, {"state": "receiving"}),
                (front.load.num_waiting, {"state": "waiting"}),
                (front.load.num_running, {"state": "running"}),
            ],
        )
        observe(catalogue.KV_USED_BLOCKS, lambda: [(front.load.num_used_blocks, {})])
        observe(catalogue.KV_BLOCKS, lambda: [(front.load.num_blocks, {})])
        observe(catalogue.PROMPT_TOKENS, lambda: [(front.counters.num_prompt_tokens, {})])
        observe(catalogue.OUTPUT_TOKENS, lambda: [(self._num_output_tokens, {})])
        observe(catalogue.PREFIX_HIT_TOKENS, lambda: [(front.counters.num_cached_tokens, {})])
        observe(catalogue.ENCODED_ITEMS, lambda: [(front.counters.num_encoded_items, {})])
        observe(catalogue.ENCODER_HITS, lambda: [(front.counters.num_encoder_cache_hits, {})])
        observe(catalogue.PREEMPTIONS, lambda: [(front.counters.num_preemptions, {})])

    def _observe_items(self) -> None:
        front, observe = self._front, self._telemetry.observe
        observe(
            catalogue.ITEMS,
            lambda: [
                (front.reception_counters.num_received_items, {"source": "received"}),
                (front.reception_counters.num_held_items, {"source": "held"}),
            ],
        )
        observe(
            catalogue.PAYLOAD,
            lambda: [
                (front.reception_counters.num_received_bytes, {"kind": "tensors_received"}),
                (front.reception_counters.num_held_bytes, {"kind": "tensors_held"}),
            ],
        )
        observe(catalogue.MEDIA_MEMORY, lambda: [(front.num_pinned_bytes, {})])


def _add_engine_stages(span: RequestSpan, submitted: float, finished: Finished, now: float) -> None:
    """What the engine spent its time on; a stage that did not end lasted until now."""
    if finished.queue_seconds is None:
        span.add_stage("queue", submitted, now)
        return
    scheduled = finished.arrived + finished.queue_seconds
    span.add_stage("queue", submitted, scheduled)
    first_token = now if finished.prefill_seconds is None else scheduled + finished.prefill_seconds
    prefill = span.add_stage("prefill", scheduled, first_token)
    if finished.encode_began is not None and finished.encode_ended is not None:
        span.add_stage("encode", finished.encode_began, finished.encode_ended, within=prefill)
    if finished.generate_seconds is not None:
        span.add_stage("generate", first_token, first_token + finished.generate_seconds)


def _log_end(request: FrontRequest) -> None:
    LOG.debug(
        "request ended",
        extra={
            "request_id": request.admitted.request_id,
            "seconds": round(time.monotonic() - request.started, 6),
            "output_tokens": request.num_output_tokens,
            "error": request.error.reason if request.error else None,
        },
    )
