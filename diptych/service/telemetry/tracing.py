"""Stages of the request that is being served: a span and a measured duration each.

The request's telemetry travels in context variables, which tasks and `asyncio.to_thread` inherit, so the code on the
path passes nothing on. Outside a request, as in the `diptych plan` command, a stage is nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

import grpc
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from diptych.service.errors import DiptychError
from diptych.service.telemetry.propagation import unrecorded

if TYPE_CHECKING:
    from diptych.service.telemetry.service import Telemetry

CANCELLED: Final = grpc.StatusCode.CANCELLED.name
AttributeValue = str | bool | int | float
CURRENT: Final[ContextVar[Telemetry | None]] = ContextVar("diptych_telemetry", default=None)


class Stage:
    """A stage as a block; an exception marks its span and counts as a failure of the stage."""

    __slots__ = ("_attributes", "_began", "_kind", "_name", "_span", "_telemetry", "_token")

    def __init__(self, telemetry: Telemetry, name: str, kind: SpanKind, attributes: dict[str, AttributeValue]) -> None:
        self._telemetry = telemetry
        self._name = name
        self._kind = kind
        self._attributes = attributes

    def __enter__(self) -> Self:
        tracer = self._telemetry.tracer
        self._span: Span | None = None
        # Within a span that is not sampled nothing would be recorded.
        if tracer is not None and trace.get_current_span().is_recording():
            attributes = {f"diptych.{name}": value for name, value in self._attributes.items()}
            self._span = tracer.start_span(self._name, kind=self._kind, attributes=attributes)
            self._token: Token[Context] = otel_context.attach(trace.set_span_in_context(self._span))
        self._began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._telemetry.record_stage(self._name, time.perf_counter() - self._began)
        if error is not None:
            self._telemetry.count_failure(self._name, code_of(error))
        if self._span is not None:
            otel_context.detach(self._token)
            if error is not None:
                mark_failed(self._span, error)
            self._span.end()


class _NoStage:
    """A stage outside any request, or of a service that neither records nor measures."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


_NO_STAGE: Final = _NoStage()


def stage(name: str, *, is_remote: bool = False, **attributes: AttributeValue) -> Stage | _NoStage:
    """A block of the current request's work: a span, and a measured duration.

    `is_remote` marks a wait for another service; attributes become `diptych.NAME`.
    """
    telemetry = CURRENT.get()
    if telemetry is None or not telemetry.is_on:
        return _NO_STAGE
    return Stage(telemetry, name, SpanKind.CLIENT if is_remote else SpanKind.INTERNAL, attributes)


def annotate(make_attributes: Callable[[], Mapping[str, AttributeValue | list[str]]]) -> None:
    """Attributes of the current span, under their full names; made only where it is recorded."""
    span = trace.get_current_span()
    if span.is_recording():
        for name, value in make_attributes().items():
            span.set_attribute(name, value)


def note_error(error: DiptychError) -> None:
    """Say on the current span what the request failed with."""
    span = trace.get_current_span()
    if span.is_recording():
        describe_error(span, error)


def trace_fields() -> dict[str, str]:
    """`trace_id` and `span_id` of the current request in hexadecimal; empty outside requests."""
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return {}
    return {"trace_id": trace.format_trace_id(context.trace_id), "span_id": trace.format_span_id(context.span_id)}


def begin_span(telemetry: Telemetry, name: str, parent: Context, began_ns: int | None = None) -> Span:
    """The span of a request that comes from outside."""
    if telemetry.tracer is None:
        return unrecorded(parent)
    return telemetry.tracer.start_span(name, parent, kind=SpanKind.SERVER, start_time=began_ns)


def code_of(error: BaseException) -> str:
    """The name of the gRPC status that an exception ends a request with."""
    if isinstance(error, DiptychError):
        return error.code.name
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return CANCELLED
    return grpc.StatusCode.INTERNAL.name


def describe_error(span: Span, error: DiptychError) -> None:
    """The error's facts as attributes."""
    for name, value in error.metadata.items():
        span.set_attribute(f"diptych.error.{name}", value)


def mark_failed(span: Span, error: BaseException) -> None:
    """Status and `error.type` of a span whose work ended with an exception."""
    if not span.is_recording():
        return
    if isinstance(error, DiptychError):
        describe_error(span, error)
    set_status(span, code_of(error), str(error))


def set_status(span: Span, code: str, message: str = "") -> None:
    """Mark a span as ended with a gRPC status; to be cancelled is an end, and no error."""
    span.set_attribute("diptych.status", code)
    if code == CANCELLED:
        return
    span.set_attribute("error.type", code)
    span.set_status(Status(StatusCode.ERROR, f"{code}: {message}" if message else code))
