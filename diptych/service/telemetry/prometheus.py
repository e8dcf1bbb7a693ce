"""The endpoint that Prometheus scrapes."""

from __future__ import annotations

from typing import Final

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from prometheus_client import CollectorRegistry, start_http_server

from diptych.service.errors import UnavailableError

_SHUTDOWN_SECONDS: Final = 5.0


class PrometheusEndpoint:
    """`GET /metrics` on a thread of its own; `reader` is to be given to the meter provider.

    The registry is this endpoint's own: the process-wide one would mix the services of one process.
    """

    def __init__(self, host: str, port: int) -> None:
        """`port` 0 picks a free one. UnavailableError if it is taken."""
        registry = CollectorRegistry()
        self.reader = PrometheusMetricReader(scope_info_enabled=False, registry=registry)
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise UnavailableError(f"cannot serve metrics on {host}:{port}: {error}", stage="boot") from error
        self.address = f"{host}:{self._server.server_port}"

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(_SHUTDOWN_SECONDS)
