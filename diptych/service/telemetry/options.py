"""What an operator can choose about telemetry."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TelemetryOptions:
    """`service_name` is OpenTelemetry's `service.name`.

    `otlp_endpoint` (http://HOST:PORT, gRPC) receives traces and metrics, None: nothing is sent. Of the traces that
    begin here, the share `sample_ratio` (0 to 1) is recorded; those that a caller began follow the caller. Metrics
    are served to Prometheus on `metrics_host`:`metrics_port`; None: not at all, 0: on a free port.
    """

    service_name: str
    otlp_endpoint: str | None = None
    sample_ratio: float = 1.0
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = None

    @property
    def has_metrics(self) -> bool:
        """Whether anybody reads the metrics."""
        return self.otlp_endpoint is not None or self.metrics_port is not None
