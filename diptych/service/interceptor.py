"""The one place where an exception becomes a gRPC status."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from grpc_status import rpc_status

from diptych.service.errors import DiptychError, InternalError
from diptych.service.telemetry import note_error

LOG = logging.getLogger("diptych.rpc")


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Ends a failing call with the error's status and details; anything untyped is INTERNAL and logged whole."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Wrap the method's handler."""
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith("/grpc."):
            return handler
        return _wrapped(handler, handler_call_details.method)


def _wrapped(handler: grpc.RpcMethodHandler, method: str) -> grpc.RpcMethodHandler:
    codec = {
        "request_deserializer": handler.request_deserializer,
        "response_serializer": handler.response_serializer,
    }
    if handler.response_streaming:
        inner = handler.stream_stream if handler.request_streaming else handler.unary_stream
        make = (
            grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
        )
        return make(_streaming(inner, method), **codec)
    inner = handler.stream_unary if handler.request_streaming else handler.unary_unary
    make = grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
    return make(_unary(inner, method), **codec)


def _unary(inner: Callable[..., Awaitable[Any]], method: str) -> Callable[..., Awaitable[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await inner(request, context)
        except Exception as error:
            await _abort(context, error, method)

    return call


def _streaming(inner: Callable[..., AsyncIterator[Any]], method: str) -> Callable[..., AsyncIterator[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        responses = inner(request, context)
        try:
            async for response in responses:
                yield response
        except Exception as error:
            await _abort(context, error, method)
        finally:
            await responses.aclose()  # type: ignore[attr-defined]

    return call


async def _abort(context: grpc.aio.ServicerContext, error: Exception, method: str) -> None:
    """End the call; grpc's own abort and cancellations pass through."""
    if isinstance(error, grpc.aio.AbortError | asyncio.CancelledError):
        raise error
    if not isinstance(error, DiptychError):
        LOG.exception("unexpected error in %s", method)
        error = InternalError("internal error; the server's log has the details", stage="rpc")
    note_error(error)
    await context.abort_with_status(rpc_status.to_status(error.to_status()))
