"""One Execute stream carrying any number of requests; shared by all or opened for one, the code is the same."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any, Final

import grpc
import numpy as np

from diptych.service.errors import UnavailableError
from diptych.v1 import executor_pb2
from diptych.wire.framing import ItemChunk, encode_request
from preprocess_service.executor_client.outbox import Outbox
from preprocess_service.executor_client.request import MissingItems, PromptScores, RemoteRequest, TokenOutput

LOG = logging.getLogger("diptych.preprocess.executor")
EXECUTE: Final = "/diptych.v1.ExecutorService/Execute"
RETRY_AFTER: Final = 1.0
_CLOSE_GRACE: Final = 2.0
_MAX_HANDLE: Final = 1 << 32


class ExecutorStream:
    """Sends requests to one executor and hands what comes back to each.

    `closes_when_idle`: the stream was opened for one request and ends after it. `on_sent` is told the bytes of every
    chunk that went out.
    """

    def __init__(
        self, channel: grpc.aio.Channel, address: str, closes_when_idle: bool, on_sent: Callable[[int], None]
    ) -> None:
        self._address = address
        self._closes_when_idle = closes_when_idle
        self._on_sent = on_sent
        self._call: Any = channel.stream_stream(
            EXECUTE,
            response_deserializer=executor_pb2.ExecuteResponse.FromString,
        )()
        self._outbox = Outbox()
        self._requests: dict[int, RemoteRequest] = {}
        self._next_handle = 1
        self.is_open = True
        self._writer = asyncio.create_task(self._write())
        self._reader = asyncio.create_task(self._read())
        self._closing: asyncio.Task[None] | None = None

    def start(self, start: executor_pb2.Start) -> RemoteRequest:
        """Begin a request."""
        if not self.is_open:
            raise self._lost_error("its stream is closed")
        request = RemoteRequest(self._new_handle(), self)
        self._requests[request.handle] = request
        self._outbox.add_control(executor_pb2.ExecuteRequest(handle=request.handle, start=start))
        return request

    def send_tensor(self, handle: int, item_index: int, tensor_index: int, array: np.ndarray) -> None:
        """Queue a tensor of a request; it goes out under the request's credit."""
        self._outbox.add_tensor(handle, item_index, tensor_index, array)

    def cancel(self, handle: int) -> None:
        """Cancel a request ahead of everything that waits; its handle is free again after its Final."""
        self._outbox.drop(handle)
        if self.is_open:
            cancel = executor_pb2.Cancel()
            self._outbox.add_control(executor_pb2.ExecuteRequest(handle=handle, cancel=cancel))

    def stop(self, handle: int) -> None:
        """Say that a request's answer is complete; its Final tells what it took."""
        if self.is_open:
            self._outbox.add_control(executor_pb2.ExecuteRequest(handle=handle, stop=executor_pb2.Stop()))

    async def close(self) -> None:
        """End the stream: orderly if no request is live, else at once."""
        self.is_open = False
        await _cancelled(self._writer)
        if not self._requests and not self._reader.done():
            with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
                await self._call.done_writing()
            await asyncio.wait((self._reader,), timeout=_CLOSE_GRACE)
        self._call.cancel()
        await _cancelled(self._reader)
        self._lose("the connection was closed")

    # --- writing ----------------------------------------------------------------------------------

    async def _write(self) -> None:
        """Send what the outbox gives; the transport's flow control slows this loop alone."""
        try:
            while True:
                message = await self._outbox.next()
                # Encoded here, for grpc would log a failure and go on without the message.
                await self._call.write(encode_request(message))
                if isinstance(message, ItemChunk):
                    self._on_sent(len(message.data))
        except (grpc.RpcError, asyncio.InvalidStateError):
            return  # the reader learns why
        except Exception:
            LOG.exception("unexpected error while sending to executor %s", self._address)
            self._lose("a message could not be sent to it")

    def _new_handle(self) -> int:
        while self._next_handle in self._requests:
            self._next_handle = (self._next_handle + 1) % _MAX_HANDLE
        handle = self._next_handle
        self._next_handle = (handle + 1) % _MAX_HANDLE
        return handle

    # --- reading ----------------------------------------------------------------------------------

    async def _read(self) -> None:
        try:
            async for response in self._call:
                self._dispatch(response)
        except grpc.RpcError as error:
            self._lose(_describe(error))
        except asyncio.CancelledError:
            self._lose("the connection was closed")
            # A cancelled call and a cancelled task look the same here; only the latter is passed on.
            if not self._call.cancelled():
                raise
        except Exception:
            LOG.exception("unexpected answer of executor %s", self._address)
            self._lose("its answer cannot be understood")
        else:
            self._lose("it closed the stream")

    def _dispatch(self, response: executor_pb2.ExecuteResponse) -> None:
        kind = response.WhichOneof("message")
        if kind == "step_outputs":
            self._deliver(response.step_outputs)
        elif kind == "credit":
            if response.credit.handle in self._requests:
                self._outbox.add_credit(response.credit.handle, response.credit.bytes)
        elif kind == "missing_items":
            if (request := self._requests.get(response.missing_items.handle)) is not None:
                request.receive(MissingItems(tuple(response.missing_items.item_indices)))
        elif kind == "prompt_logprobs":
            if (request := self._requests.get(response.prompt_logprobs.handle)) is not None:
                request.receive(PromptScores(tuple(response.prompt_logprobs.logprobs)))
        elif kind == "final":
            self._end(response.final)

    def _deliver(self, outputs: executor_pb2.StepOutputs) -> None:
        logprobs = {entry.index: entry.logprobs for entry in outputs.logprobs}
        for index, (handle, token_id) in enumerate(zip(outputs.handles, outputs.token_ids, strict=True)):
            if (request := self._requests.get(handle)) is not None:
                request.receive(TokenOutput(token_id, logprobs.get(index)))

    def _end(self, final: executor_pb2.Final) -> None:
        self._outbox.drop(final.handle)
        if (request := self._requests.pop(final.handle, None)) is None:
            LOG.warning("executor %s ended a request it does not have (handle %d)", self._address, final.handle)
            return
        request.end(final)
        if self._closes_when_idle and not self._requests and self._closing is None:
            self._closing = asyncio.create_task(self.close())

    def _lose(self, reason: str) -> None:
        was_open, self.is_open = self.is_open, False
        self._writer.cancel()
        self._call.cancel()  # where we are the ones who give up, the executor is to know
        requests, self._requests = list(self._requests.values()), {}
        for request in requests:
            request.lose(self._lost_error(reason))
        if requests and was_open:
            LOG.warning("lost the stream to executor %s with %d requests: %s", self._address, len(requests), reason)

    def _lost_error(self, reason: str) -> UnavailableError:
        return UnavailableError(
            f"the executor {self._address} went away: {reason}", stage="executor", retry_after=RETRY_AFTER
        )


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    if task is not asyncio.current_task():
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _describe(error: Any) -> str:
    """`UNAVAILABLE: …` of a failed call."""
    return f"{error.code().name}: {error.details()}"
