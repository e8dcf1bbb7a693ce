"""W3C trace context: in from call metadata or two strings, out as the same two strings.

Every request gets a trace id, so that log lines of both services can be matched even where no trace is recorded.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, SpanContext
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

TRACEPARENT: Final = "traceparent"
TRACESTATE: Final = "tracestate"
_W3C: Final = TraceContextTextMapPropagator()


def from_headers(traceparent: str, tracestate: str = "") -> Context:
    """The caller's trace context; an empty one if there is none, or a malformed one."""
    if not traceparent:
        return Context()
    return _W3C.extract({TRACEPARENT: traceparent, TRACESTATE: tracestate}, context=Context())


def from_metadata(metadata: Iterable[tuple[str, str | bytes]] | None) -> Context:
    """The trace context in a call's metadata."""
    found = {name: value for name, value in metadata or () if name in (TRACEPARENT, TRACESTATE)}
    return from_headers(_text(found.get(TRACEPARENT)), _text(found.get(TRACESTATE)))


def to_headers(context: Context | None = None) -> dict[str, str]:
    """`traceparent` and, where there is one, `tracestate` of a context; the current one by default."""
    headers: dict[str, str] = {}
    _W3C.inject(headers, context=context)
    return headers


def unrecorded(parent: Context) -> NonRecordingSpan:
    """A span that nobody records: the caller's trace goes through it, or a new trace id begins."""
    caller = trace.get_current_span(parent).get_span_context()
    if caller.is_valid:
        return NonRecordingSpan(caller)
    return NonRecordingSpan(SpanContext(_new_id(128), _new_id(64), is_remote=False))


def _new_id(num_bits: int) -> int:
    """Random and not 0, which W3C reserves."""
    return random.getrandbits(num_bits) or 1  # names a trace, guards nothing


def _text(value: str | bytes | None) -> str:
    return value if isinstance(value, str) else ""
