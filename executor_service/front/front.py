"""The front: requests from every stream, their tensors in the arena, their turn at the engine, their end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import replace
from typing import Final

from diptych.service.errors import (
    DeadlineError,
    DiptychError,
    InternalError,
    InvalidInputError,
    LimitExceededError,
    OverloadedError,
    RequestCancelledError,
    UnavailableError,
)
from diptych.service.telemetry import Telemetry
from diptych.v1 import executor_pb2, tensor_pb2
from diptych.wire.framing import ItemChunk
from executor_service.engine.messages import (
    Abort,
    Announce,
    Booted,
    Complete,
    Counters,
    EngineConfig,
    Finished,
    FinishReason,
    ItemSlots,
    Load,
    StepEnd,
    StepTokens,
    Submit,
)
from executor_service.front.admission import Admission, AdmittedRequest
from executor_service.front.arena import Arena
from executor_service.front.boot_log import BootLog
from executor_service.front.engine_link import ENGINE_MODULE, EngineLink
from executor_service.front.reception import Reception, ReceptionCounters
from executor_service.front.reports import FrontReports
from executor_service.front.request import FrontRequest, Outlet
from registry.family import ModelFamily

LOG = logging.getLogger("diptych.executor")
TOUCH_DELAY: Final = 0.005
"""Seconds from a request's way to the engine until memory is touched for the next: its first token may come sooner."""
_FINISH_REASONS = {
    FinishReason.STOP: tensor_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: tensor_pb2.FINISH_REASON_LENGTH,
}


class Front:
    """Everything between the streams and the engine. Lives in one event loop."""

    def __init__(
        self,
        config: EngineConfig,
        arena_bytes: int,
        max_requests: int,
        receive_timeout: float,
        telemetry: Telemetry,
        engine_module: str = ENGINE_MODULE,
    ) -> None:
        self.config = config
        self._max_requests = max_requests
        self._arena = Arena(arena_bytes)
        self._reception = Reception(self._arena, receive_timeout, self._submit, self.end)
        self.boot_log = BootLog()
        self._link = EngineLink(self.boot_log.show, self._on_tokens, self._on_step_end, engine_module)
        self._requests: dict[int, FrontRequest] = {}
        self._next_number = 0
        self._family: ModelFamily | None = None
        self._admission: Admission | None = None
        self._booted: Booted | None = None
        self._draining = False
        self.load = Load(0, 0, 0, 0)
        self.counters = Counters()
        self._reports = FrontReports(telemetry, self)
        self._closed = asyncio.Event()
        self._touching: asyncio.TimerHandle | asyncio.Handle | None = None

    @property
    def family(self) -> ModelFamily:
        """What the checkpoint's items are."""
        assert self._family is not None
        return self._family

    @property
    def booted(self) -> Booted:
        """What the engine said of itself; UnavailableError before that."""
        if self._booted is None:
            raise UnavailableError("the executor is booting", stage="boot", retry_after=1.0)
        return self._booted

    @property
    def num_receiving(self) -> int:
        """Requests whose tensors are still arriving."""
        # A copy, because metrics are read by another thread.
        return sum(not request.is_at_engine for request in list(self._requests.values()))

    @property
    def num_pinned_bytes(self) -> int:
        """Bytes of the arena that live requests hold; the rest may be forgotten."""
        return self._arena.num_used_bytes - self._reception.store.num_unused_bytes

    @property
    def reception_counters(self) -> ReceptionCounters:
        """What has arrived, and what did not need to."""
        return self._reception.counters

    @property
    def is_accepting(self) -> bool:
        """Whether new requests are taken."""
        return not self._draining and self._booted is not None

    # --- lifecycle --------------------------------------------------------------------------------

    def launch(self) -> None:
        """Start the engine process, which takes longer than everything else; so it comes first."""
        self._link.launch(self.config, self._arena)

    async def start(self, family: ModelFamily) -> None:
        """Wait until the engine is booted, then take requests for items of `family`."""
        self._family = family
        self._booted = await self._link.wait_booted()
        self._admission = Admission(family, self._booted)
        self.load = Load(0, 0, 0, self._booted.ledger.num_blocks)
        assert self._link.died is not None
        self._link.died.add_done_callback(self._on_death)

    async def drain(self, grace: float) -> None:
        """Take no new requests; end those that are not done after `grace` seconds."""
        self._draining = True
        await self._wait_idle(grace)
        for request in list(self._requests.values()):
            self.end(request, UnavailableError("the executor is stopping", stage=request.stage, retry_after=1.0))
        await self._wait_idle(1.0)

    async def stop(self) -> None:
        """End the engine process and free the memory."""
        await self._link.stop()
        if self._touching is not None:
            self._touching.cancel()
        self._arena.close()

    async def wait_failed(self) -> str:
        """Returns the reason when the engine has died."""
        assert self._link.died is not None
        return await asyncio.shield(self._link.died)

    def check_integrity(self) -> None:
        """AssertionError unless arena, items and credit are whole and belong to live requests."""
        self._reception.check_integrity(self._requests.values())

    # --- requests ---------------------------------------------------------------------------------

    def open(self, handle: int, start: executor_pb2.Start, outlet: Outlet) -> FrontRequest:
        """Admit a request; its tensors are asked for, or it goes to the engine at once. DiptychError: refused."""
        span = self._reports.begin(start)
        try:
            admitted = self._admit(start)
        except Exception as error:
            self._reports.refuse(span, error)
            raise
        request = FrontRequest(self._next_number, handle, outlet, admitted, span)
        self._next_number += 1
        self._requests[request.number] = request
        self._set_deadline(request)
        try:
            self._begin(request)
        except Exception:
            request.error = InternalError("the request could not be begun", stage="receive")
            self._close(request)  # its stream does not know it yet
            raise
        return request

    def _begin(self, request: FrontRequest) -> None:
        if not request.admitted.items:
            self._submit(request)
            return
        self._reception.begin(request)
        if not request.is_at_engine:
            # In the loop's next turn: by then its sender knows what is missing.
            asyncio.get_running_loop().call_soon(self._announce, request)

    def _announce(self, request: FrontRequest) -> None:
        """Let the engine read all but the tensors while they arrive."""
        if request.error is None and not request.is_at_engine:
            self._link.send(Announce(_submit(request, self._reception.expected_slots(request))))
            request.is_announced = True

    def _admit(self, start: executor_pb2.Start) -> AdmittedRequest:
        self._check_room()
        assert self._admission is not None
        admitted = self._admission.admit(start)
        region_bytes = sum(item.region_bytes for item in admitted.items)
        if region_bytes > self._arena.num_bytes:
            raise LimitExceededError(
                f"the request's tensors have {region_bytes} bytes; at most {self._arena.num_bytes} fit",
                stage="admit",
                limit=self._arena.num_bytes,
                actual=region_bytes,
            )
        return admitted

    def receive(self, request: FrontRequest, chunk: ItemChunk) -> None:
        """Take a chunk; a wrong one ends the request."""
        if request.error is not None:
            return  # sent before the sender knew
        try:
            self._reception.receive(request, chunk)
        except DiptychError as error:
            self.end(request, error)

    def end_of_chunks(self, request: FrontRequest) -> None:
        """No more chunks come on the request's stream."""
        self._reception.end_of_chunks(request)

    def cancel(self, request: FrontRequest) -> None:
        """The client does not want it any more."""
        self.end(request, RequestCancelledError("the request was cancelled", stage=request.stage))

    def stop_generating(self, request: FrontRequest) -> None:
        """The client has all it wants: the request ends well, with the tokens that have gone out."""
        if not request.num_output_tokens:
            self.cancel(request)
        elif request.error is None and not request.is_stopped:
            request.is_stopped = True
            self._link.send(Abort((request.number,)))

    def _check_room(self) -> None:
        if not self.is_accepting:
            self.booted  # noqa: B018 - says so if the engine is still booting
            raise UnavailableError("the executor is stopping", stage="admit", retry_after=1.0)
        if len(self._requests) >= self._max_requests:
            raise OverloadedError(
                f"the executor has {len(self._requests)} requests; at most {self._max_requests} are taken",
                stage="admit",
                limit=self._max_requests,
                actual=len(self._requests),
                retry_after=1.0,
            )

    def _set_deadline(self, request: FrontRequest) -> None:
        if request.admitted.time_left is not None:
            loop = asyncio.get_running_loop()
            request.deadline = loop.call_later(request.admitted.time_left, self._on_deadline, request)

    def _on_deadline(self, request: FrontRequest) -> None:
        self.end(request, DeadlineError(f"the deadline passed in stage {request.stage}", stage=request.stage))

    def _submit(self, request: FrontRequest) -> None:
        message: Complete | Submit
        if request.is_announced:
            message = Complete(request.number, *self._reception.contents(request))
        else:
            message = _submit(request, self._reception.slots(request))
        # From here on only the engine can end it.
        request.received = time.monotonic()
        request.is_at_engine = True
        self._link.send(message)
        if self._touching is None:
            self._touching = asyncio.get_running_loop().call_later(TOUCH_DELAY, self._touch_ahead)

    def _touch_ahead(self) -> None:
        """Make memory ready for the requests to come, a little in every turn of the loop."""
        has_more = self._arena.touch_ahead()
        self._touching = asyncio.get_running_loop().call_soon(self._touch_ahead) if has_more else None

    def end(self, request: FrontRequest, error: DiptychError) -> None:
        """End a request with an error; at the engine it is aborted first, and reported when its blocks are free."""
        if request.error is not None or request.number not in self._requests:
            return
        request.error = error
        if request.is_at_engine or request.is_announced:
            self._link.send(Abort((request.number,)))
        if not request.is_at_engine:
            self._close(request)
            request.outlet.put_final(executor_pb2.Final(handle=request.handle, status=error.to_status()))

    def _close(self, request: FrontRequest, finished: Finished | None = None) -> None:
        del self._requests[request.number]
        self._closed.set()
        self._reports.end(request, finished)
        if request.deadline is not None:
            request.deadline.cancel()
        self._reception.end(request)

    # --- the engine's side --------------------------------------------------------------------------

    def _on_tokens(self, tokens: StepTokens) -> None:
        """Give every stream its share of the step, in one message each."""
        for number, entries in tokens.prompt_logprobs:
            if (request := self._requests[number]).error is None:
                request.outlet.put_prompt_logprobs(request.handle, entries)
        logprobs = dict(tokens.logprobs)
        touched: dict[Outlet, None] = {}
        for index, (number, token_id) in enumerate(zip(tokens.request_ids, tokens.token_ids, strict=True)):
            request = self._requests[number]
            if request.error is None and not request.is_stopped:
                request.num_output_tokens += 1
                request.outlet.put_token(request.handle, token_id, logprobs.get(index))
                touched[request.outlet] = None
        for outlet in touched:
            outlet.flush()

    def _on_step_end(self, end: StepEnd) -> None:
        """Who has ended gets its Final, behind its tokens, which are with the transport by now."""
        self.load, self.counters = end.load, end.counters
        for finished in end.finished:
            request = self._requests[finished.request_id]
            final = self._final(request, finished)
            self._close(request, finished)
            request.outlet.put_final(final)
        self._reports.step(end)

    def _final(self, request: FrontRequest, finished: Finished) -> executor_pb2.Final:
        if finished.reason is FinishReason.FAILED:
            with request.span.active():
                LOG.error("request %s failed in the engine: %s", request.admitted.request_id, finished.error)
            request.error = InternalError("the model failed on this request; the log has the details", stage="execute")
        if finished.reason is FinishReason.MISMATCHED:
            request.error = InvalidInputError(finished.error, stage="encode")
        if request.error is not None:
            return executor_pb2.Final(handle=request.handle, status=request.error.to_status())
        if request.is_stopped:  # whatever the engine has made of it since
            finished = replace(finished, reason=FinishReason.STOP)
        return executor_pb2.Final(handle=request.handle, completion=_completion(request, finished))

    def _on_death(self, died: asyncio.Future[str]) -> None:
        """Every request ends with UNAVAILABLE; nothing more is taken."""
        if died.cancelled():
            return
        self._draining = True
        for request in list(self._requests.values()):
            request.error = UnavailableError(died.result(), stage=request.stage, retry_after=1.0)
            self._close(request)
            request.outlet.put_final(executor_pb2.Final(handle=request.handle, status=request.error.to_status()))

    async def _wait_idle(self, seconds: float) -> None:
        """Until no request is left, at most `seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._requests:
                    self._closed.clear()
                    await self._closed.wait()


def _submit(request: FrontRequest, items: tuple[ItemSlots, ...]) -> Submit:
    admitted = request.admitted
    return Submit(
        request.number,
        admitted.prompt_token_ids,
        items,
        admitted.sampling,
        admitted.priority,
        admitted.output_token_ids,
    )


def _completion(request: FrontRequest, finished: Finished) -> executor_pb2.Completion:
    assert request.received is not None
    return executor_pb2.Completion(
        finish_reason=_FINISH_REASONS[finished.reason],
        usage=tensor_pb2.Usage(
            prompt_tokens=len(request.admitted.prompt_token_ids),
            image_tokens=request.admitted.num_image_tokens,
            cached_tokens=finished.num_cached_tokens,
            completion_tokens=len(request.admitted.output_token_ids) + request.num_output_tokens,
        ),
        times=tensor_pb2.StageTimes(
            transfer_seconds=request.received - request.started if request.admitted.items else None,
            queue_seconds=finished.queue_seconds,
            prefill_seconds=finished.prefill_seconds,
            generate_seconds=finished.generate_seconds,
        ),
    )
