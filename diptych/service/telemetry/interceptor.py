"""A server span around every call, and a count of how it ended."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from types import TracebackType
from typing import Any, Self

import grpc
from opentelemetry import context as otel_context
from opentelemetry import trace

from diptych.service.telemetry.propagation import from_metadata
from diptych.service.telemetry.service import Telemetry
from diptych.service.telemetry.tracing import CURRENT, begin_span, code_of, set_status

LOG = logging.getLogger("diptych.rpc")
Handler = Callable[..., Any]


class TelemetryInterceptor(grpc.aio.ServerInterceptor):
    """Stands outside the error interceptor, whose status it reads.

    Calls that stream requests carry many, and those report themselves. `unwatched` are the names of other methods
    that last as long as their peer.
    """

    def __init__(self, telemetry: Telemetry, unwatched: Collection[str] = ()) -> None:
        self._telemetry = telemetry
        self._unwatched = frozenset(unwatched)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Wrap the method's handler."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith("/grpc.") or method.rpartition("/")[2] in self._unwatched:
            return handler
        if handler.request_streaming:
            return handler
        return self._wrapped(handler, method)

    def _wrapped(self, handler: grpc.RpcMethodHandler, method: str) -> grpc.RpcMethodHandler:
        codec = (handler.request_deserializer, handler.response_serializer)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(self._streaming(handler.unary_stream, method), *codec)
        return grpc.unary_unary_rpc_method_handler(self._unary(handler.unary_unary, method), *codec)

    def _unary(self, inner: Handler, method: str) -> Handler:
        async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
            with _Call(self._telemetry, method, context):
                return await inner(request, context)

        return call

    def _streaming(self, inner: Handler, method: str) -> Handler:
        async def call(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            with _Call(self._telemetry, method, context):
                responses = inner(request, context)
                try:
                    async for response in responses:
                        yield response
                finally:
                    await responses.aclose()

        return call


class _Call:
    """One call. Nothing is detached at its end: grpc runs each call in a task, whose context ends with it."""

    def __init__(self, telemetry: Telemetry, method: str, context: Any) -> None:
        self._telemetry = telemetry
        self._service, _, self._method = method.lstrip("/").rpartition("/")
        self._context = context
        self._began = time.perf_counter()

    def __enter__(self) -> Self:
        parent = from_metadata(self._context.invocation_metadata())
        self._span = begin_span(self._telemetry, f"{self._service}/{self._method}", parent)
        if self._span.is_recording():
            self._span.set_attributes({"rpc.system": "grpc", "rpc.service": self._service, "rpc.method": self._method})
        otel_context.attach(trace.set_span_in_context(self._span))
        CURRENT.set(self._telemetry)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        code = self._code(error)
        LOG.debug("call ended", extra=self._facts(code))
        self._telemetry.count_request(self._method, code.name)
        if self._span.is_recording():
            self._span.set_attribute("rpc.grpc.status_code", code.value[0])
            if code is not grpc.StatusCode.OK:
                set_status(self._span, code.name, self._context.details() or "")
        self._span.end()

    def _facts(self, code: grpc.StatusCode) -> dict[str, object]:
        seconds = round(time.perf_counter() - self._began, 6)
        return {"method": self._method, "code": code.name, "seconds": seconds}

    def _code(self, error: BaseException | None) -> grpc.StatusCode:
        if error is None:
            return grpc.StatusCode.OK
        if isinstance(error, grpc.aio.AbortError):
            return _as_code(self._context.code())
        return grpc.StatusCode[code_of(error)]


def _as_code(value: Any) -> grpc.StatusCode:
    """grpc.aio gives the number of a status that was set by `abort_with_status`."""
    if isinstance(value, grpc.StatusCode):
        return value
    return next((code for code in grpc.StatusCode if code.value[0] == value), grpc.StatusCode.UNKNOWN)
