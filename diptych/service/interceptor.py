"""The one place where an exception becomes a gRPC status, and what keeps wrapped handlers."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from diptych.service.errors import DiptychError, InternalError, InvalidInputError
from diptych.service.telemetry import note_error
from diptych.wire.bounds import MAX_TEXT_BYTES, check_bounds

LOG = logging.getLogger("diptych.rpc")
CHANNELZ: Final = "/grpc.channelz."
"""For whoever debugs the service; its methods are not asynchronous."""


class HandlerCache(grpc.aio.ServerInterceptor):
    """Stands outside all others, which wrap a method's handler for its first call only."""

    def __init__(self) -> None:
        self._handlers: dict[str, grpc.RpcMethodHandler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """The handler as it was wrapped before; methods that do not exist are not remembered."""
        method = handler_call_details.method
        if (known := self._handlers.get(method)) is not None:
            return known
        handler = await continuation(handler_call_details)
        if handler is not None:
            self._handlers[method] = handler
        return handler


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Ends a failing call with the error's status and details; anything untyped is INTERNAL and logged whole.

    Messages with more in them than any request needs are refused before they are parsed, texts of more than
    `max_text_bytes` among them.
    """

    def __init__(self, max_text_bytes: int = MAX_TEXT_BYTES) -> None:
        self._max_text_bytes = max_text_bytes

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Wrap the method's handler."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(CHANNELZ):
            return handler
        return _wrapped(handler, method, self._max_text_bytes)


def _wrapped(handler: grpc.RpcMethodHandler, method: str, max_text_bytes: int) -> grpc.RpcMethodHandler:
    """The handler, given raw bytes: a request that grpc cannot parse would never get here."""
    codec = {"request_deserializer": None, "response_serializer": handler.response_serializer}
    check = functools.partial(_check, _message_of(method), max_text_bytes)
    parse: Callable[[Any], Any] = functools.partial(_parse, handler.request_deserializer, method, check)
    if handler.request_streaming:
        parse = functools.partial(_parse_all, parse)
    if handler.response_streaming:
        inner = handler.stream_stream if handler.request_streaming else handler.unary_stream
        make = (
            grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
        )
        # grpc's own Health.Watch writes to its context instead of yielding.
        wrap = _unary if inspect.iscoroutinefunction(inner) else _streaming
        return make(wrap(inner, parse, method), **codec)
    inner = handler.stream_unary if handler.request_streaming else handler.unary_unary
    make = grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
    return make(_unary(inner, parse, method), **codec)


def _message_of(method: str) -> Descriptor | None:
    """What a method takes; None for one that nobody has described."""
    service, _, name = method.lstrip("/").partition("/")
    try:
        return descriptor_pool.Default().FindServiceByName(service).FindMethodByName(name).input_type
    except KeyError:
        return None


def _check(message: Descriptor | None, max_text_bytes: int, data: bytes) -> None:
    if message is not None:
        check_bounds(data, message, max_text_bytes)


def _parse(deserialize: Callable[[bytes], Any] | None, method: str, check: Callable[[bytes], None], data: bytes) -> Any:
    try:
        check(data)
        return deserialize(data) if deserialize is not None else data
    except DecodeError as error:
        raise InvalidInputError(f"the bytes sent are no message that {method} takes", stage="receive") from error


async def _parse_all(parse: Callable[[bytes], Any], messages: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    async for data in messages:
        yield parse(data)


def _unary(
    inner: Callable[..., Awaitable[Any]], parse: Callable[[Any], Any], method: str
) -> Callable[..., Awaitable[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await inner(parse(request), context)
        except Exception as error:
            await _abort(context, error, method)

    return call


def _streaming(
    inner: Callable[..., AsyncIterator[Any]], parse: Callable[[Any], Any], method: str
) -> Callable[..., AsyncIterator[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        try:
            async with contextlib.aclosing(inner(parse(request), context)) as responses:  # type: ignore[type-var]
                async for response in responses:
                    yield response
        except Exception as error:
            await _abort(context, error, method)

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
