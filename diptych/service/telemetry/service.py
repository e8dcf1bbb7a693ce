"""One service's telemetry: its tracer, its instruments, and what reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from opentelemetry import metrics as otel
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.trace import Tracer

from diptych.service.telemetry.metrics import REQUESTS, STAGE_DURATION, STAGE_FAILURES, Kind, Metric
from diptych.service.telemetry.options import TelemetryOptions
from diptych.service.telemetry.tracing import CANCELLED

if TYPE_CHECKING:
    from diptych.service.telemetry.providers import Providers

SCOPE = "diptych"
Labels = Mapping[str, str]
Readings = Callable[[], Iterable[tuple[float, Labels]]]


class Telemetry:
    """Traces and metrics of one service; what nobody asked for costs next to nothing.

    `tracer` is None where no trace is exported. `is_on`: somebody reads traces or metrics.
    """

    def __init__(self, options: TelemetryOptions | None = None) -> None:
        """`options` None: nothing is recorded. UnavailableError if a package or the metrics port is not there."""
        self.tracer: Tracer | None = None
        self.metrics_address: str | None = None
        self.is_on = False
        self.has_metrics = False
        self._providers: Providers | None = None
        self._meter: otel.Meter = otel.NoOpMeterProvider().get_meter(SCOPE)
        if options is not None and options.has_metrics:
            self._start(options)
        self._requests = self.counter(REQUESTS)
        self._stages = self.histogram(STAGE_DURATION)
        self._failures = self.counter(STAGE_FAILURES)

    def _start(self, options: TelemetryOptions) -> None:
        # The SDK takes 150 ms to import, and is needed only here.
        from diptych.service.telemetry.providers import Providers

        self._providers = Providers(options)
        self.is_on = self.has_metrics = True
        self.metrics_address = self._providers.metrics_address
        self._meter = self._providers.meters.get_meter(SCOPE)
        if self._providers.tracers is not None:
            self.tracer = self._providers.tracers.get_tracer(SCOPE)

    # --- instruments ------------------------------------------------------------------------------

    def counter(self, metric: Metric) -> otel.Counter:
        """For what is counted where it happens."""
        _check_kind(metric, Kind.COUNTER)
        return self._meter.create_counter(metric.name, metric.unit, metric.description)

    def histogram(self, metric: Metric) -> otel.Histogram:
        """For durations and sizes."""
        _check_kind(metric, Kind.HISTOGRAM)
        return self._meter.create_histogram(
            metric.name, metric.unit, metric.description, explicit_bucket_boundaries_advisory=metric.buckets
        )

    def observe(self, metric: Metric, readings: Readings) -> None:
        """For what is known anyway: `readings` gives (value, labels), and runs in the thread of whoever reads."""

        def observations(options: CallbackOptions) -> Iterable[Observation]:
            return [Observation(value, dict(labels)) for value, labels in readings()]

        make: Any = self._meter.create_observable_gauge
        if metric.kind is Kind.COUNTER:
            make = self._meter.create_observable_counter
        make(metric.name, [observations], metric.unit, metric.description)

    # --- what every request has -------------------------------------------------------------------

    def count_request(self, method: str, code: str) -> None:
        """A request ended with a gRPC status."""
        self._requests.add(1, {"method": method, "code": code})

    def record_stage(self, stage: str, seconds: float) -> None:
        """A request (or an item) spent so long in a stage."""
        if self.has_metrics:
            self._stages.record(seconds, {"stage": stage})

    def count_failure(self, stage: str, code: str) -> None:
        """A stage failed with a gRPC status; one that was cancelled did not."""
        if code != CANCELLED:
            self._failures.add(1, {"stage": stage, "code": code})

    def close(self) -> None:
        """Send what is unsent, as far as it goes, and stop. Blocks for some seconds if nobody takes it."""
        if self._providers is not None:
            self._providers.close()


def _check_kind(metric: Metric, kind: Kind) -> None:
    if metric.kind is not kind:
        raise TypeError(f"{metric.name} is a {metric.kind.value}, not a {kind.value}")
