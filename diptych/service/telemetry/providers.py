"""OpenTelemetry's SDK as the options ask for it: exporters, readers, and their end."""

from __future__ import annotations

import contextlib
import logging
from typing import Final

from diptych import __version__
from diptych.service.errors import UnavailableError
from diptych.service.telemetry.options import TelemetryOptions

try:
    from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.metrics import AlwaysOffExemplarFilter, MeterProvider
    from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
    from opentelemetry.sdk.trace import SpanLimits, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    from diptych.service.telemetry.prometheus import PrometheusEndpoint
except ImportError as error:
    raise UnavailableError(
        f"traces and metrics need packages that are not installed ({error.name}): "
        'pip install "diptych[preprocess]" or "diptych[executor]"',
        stage="boot",
    ) from error

LOG = logging.getLogger("diptych.telemetry")
MAX_ATTRIBUTE_LENGTH: Final = 1024
CLOSE_TIMEOUT: Final = 5.0
"""Seconds that a service waits for the collector when it stops."""


class Providers:
    """`tracers` is None without an endpoint; nothing here is the process's default, so services may share one."""

    def __init__(self, options: TelemetryOptions) -> None:
        resource = _resource(options.service_name)
        self._endpoint: PrometheusEndpoint | None = None
        self.metrics_address: str | None = None
        readers: list[MetricReader] = []
        if options.metrics_port is not None:
            self._endpoint = PrometheusEndpoint(options.metrics_host, options.metrics_port)
            self.metrics_address = self._endpoint.address
            readers.append(self._endpoint.reader)
            LOG.info("metrics on http://%s/metrics", self.metrics_address)
        if options.otlp_endpoint is not None:
            readers.append(PeriodicExportingMetricReader(OTLPMetricExporter(options.otlp_endpoint)))
        self.meters = MeterProvider(
            readers, resource, exemplar_filter=AlwaysOffExemplarFilter(), shutdown_on_exit=False
        )
        self.tracers = None if options.otlp_endpoint is None else _tracers(options, options.otlp_endpoint, resource)

    def close(self) -> None:
        """Flush and stop; a collector that is away is given up on, and only logged."""
        if self._endpoint is not None:
            self._endpoint.close()
        with contextlib.suppress(Exception):  # logged by the SDK itself; a service stops whatever happens here
            if self.tracers is not None:
                self.tracers.shutdown()
        with contextlib.suppress(Exception):
            self.meters.shutdown(CLOSE_TIMEOUT * 1000)


def _resource(service_name: str) -> Resource:
    """OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win over our own name."""
    own = Resource({SERVICE_NAME: service_name, SERVICE_VERSION: __version__})
    detected = Resource.create()
    if str(detected.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        return detected.merge(own)
    return own.merge(detected)


def _tracers(options: TelemetryOptions, endpoint: str, resource: Resource) -> TracerProvider:
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(options.sample_ratio)),
        resource=resource,
        shutdown_on_exit=False,
        span_limits=SpanLimits(max_attribute_length=MAX_ATTRIBUTE_LENGTH),
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint, timeout=CLOSE_TIMEOUT)))
    return provider
