"""A receiver of OTLP over gRPC, as a collector is one: keeps what it is sent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

ERROR = trace_pb2.Status.STATUS_CODE_ERROR


def value_of(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [value_of(entry) for entry in value.array_value.values]
    return getattr(value, kind) if kind else None


@dataclass
class Span:
    """One exported span; times in seconds since the epoch."""

    service: str
    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    began: float
    ended: float
    status: int
    message: str
    attributes: dict[str, Any]
    trace_state: str = ""
    children: list[Span] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return self.status == ERROR

    def child(self, name: str) -> Span:
        (one,) = [child for child in self.children if child.name == name]
        return one

    def walk(self) -> Iterator[Span]:
        yield self
        for child in self.children:
            yield from child.walk()


class Receiver(trace_service_pb2_grpc.TraceServiceServicer, metrics_service_pb2_grpc.MetricsServiceServicer):
    """Both collector services; `endpoint` is what services are told."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.metric_names: dict[str, set[str]] = {}
        self._spans: list[Span] = []
        self._lock = threading.Lock()

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
        with self._lock:
            if isinstance(request, trace_service_pb2.ExportTraceServiceRequest):
                self._take_spans(request)
                return trace_service_pb2.ExportTraceServiceResponse()
            self._take_metrics(request)
            return metrics_service_pb2.ExportMetricsServiceResponse()

    def _take_spans(self, request: Any) -> None:
        for resource in request.resource_spans:
            service = next(value_of(a.value) for a in resource.resource.attributes if a.key == "service.name")
            for scope in resource.scope_spans:
                self._spans += [_read(service, span) for span in scope.spans]

    def _take_metrics(self, request: Any) -> None:
        for resource in request.resource_metrics:
            service = next(value_of(a.value) for a in resource.resource.attributes if a.key == "service.name")
            names = {metric.name for scope in resource.scope_metrics for metric in scope.metrics}
            self.metric_names.setdefault(service, set()).update(names)

    @property
    def spans(self) -> list[Span]:
        with self._lock:
            return list(self._spans)

    def trees(self, trace_id: str) -> list[Span]:
        """The trace's spans without a parent among them, each with its children in order of time."""
        spans = {span.span_id: span for span in self.spans if span.trace_id == trace_id}
        for span in spans.values():
            span.children = sorted((s for s in spans.values() if s.parent_id == span.span_id), key=lambda s: s.began)
        return [span for span in spans.values() if span.parent_id not in spans]

    def wait_tree(self, trace_id: str, complete: Callable[[Span], bool], seconds: float = 15.0) -> Span:
        """The one tree of a trace, once it is complete."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            trees = self.trees(trace_id)
            if len(trees) == 1 and complete(trees[0]):
                return trees[0]
            time.sleep(0.05)
        raise AssertionError(f"no complete trace: {[(s.name, s.parent_id) for s in self.trees(trace_id)]}")


def _read(service: str, span: Any) -> Span:
    return Span(
        service, span.name, trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"), span.trace_id.hex(),
        span.span_id.hex(), span.parent_span_id.hex(), span.start_time_unix_nano / 1e9, span.end_time_unix_nano / 1e9,
        span.status.code, span.status.message, {a.key: value_of(a.value) for a in span.attributes}, span.trace_state,
    )  # fmt: skip


@contextmanager
def receiver() -> Iterator[Receiver]:
    """One on a free port of the loopback interface."""
    one = Receiver()
    server = grpc.server(ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(one, server)
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(one, server)
    one.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield one
    finally:
        server.stop(1).wait()
