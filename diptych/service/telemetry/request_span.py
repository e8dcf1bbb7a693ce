"""The span of a request that many callbacks serve: no call's context holds it, and its stages are told afterwards."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.trace import Span

from diptych.service.errors import DiptychError
from diptych.service.telemetry.propagation import from_headers
from diptych.service.telemetry.tracing import AttributeValue, begin_span, mark_failed

if TYPE_CHECKING:
    from diptych.service.telemetry.service import Telemetry


class RequestSpan:
    """Begins now. All times are seconds of `time.monotonic()`, which the processes of one machine share.

    They become wall-clock times by the difference of the two clocks at the beginning, so that a span never begins
    before its parent because somebody has set the clock.
    """

    def __init__(self, telemetry: Telemetry, name: str, traceparent: str, tracestate: str = "") -> None:
        self._telemetry = telemetry
        self._offset_ns = time.time_ns() - time.monotonic_ns()
        self._span = begin_span(telemetry, name, from_headers(traceparent, tracestate), time.time_ns())

    @property
    def is_recording(self) -> bool:
        """Whether attributes and stages are kept."""
        return self._span.is_recording()

    def annotate(self, attributes: Mapping[str, AttributeValue | list[str]]) -> None:
        """Attributes under their full names."""
        for name, value in attributes.items():
            self._span.set_attribute(name, value)

    def add_stage(self, name: str, began: float, ended: float, within: Span | None = None) -> Span | None:
        """A stage that is over: its duration is measured, and its span is a child of this one.

        `within` is an earlier stage that it was a part of. Returns the stage's span, None if there is none.
        """
        self._telemetry.record_stage(name, ended - began)
        if not self._span.is_recording() or self._telemetry.tracer is None:
            return None
        parent = trace.set_span_in_context(within or self._span)
        child = self._telemetry.tracer.start_span(name, parent, start_time=self._wall_ns(began))
        child.end(self._wall_ns(ended))
        return child

    def end(self, error: DiptychError | None, stage: str = "") -> None:
        """The request is over, well or with an error in `stage`."""
        if error is not None:
            self._telemetry.count_failure(stage, error.code.name)
            mark_failed(self._span, error)
        self._span.end(self._wall_ns(time.monotonic()))

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """What is logged in the block is this request's."""
        with trace.use_span(self._span, record_exception=False, set_status_on_exception=False):
            yield

    def _wall_ns(self, seconds: float) -> int:
        return int(seconds * 1e9) + self._offset_ns
