"""One request on an executor's stream: what arrived for it, and what it still has to send."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from diptych.service.errors import DeadlineError, DiptychError, RemoteError
from diptych.v1 import executor_pb2, tensor_pb2

LOG = logging.getLogger("diptych.preprocess.executor")


@dataclass(frozen=True, slots=True)
class MissingItems:
    """Indices of the items whose tensors the executor wants."""

    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One output token."""

    token_id: int
    logprobs: tensor_pb2.PositionLogprobs | None


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Log probabilities of the next prompt tokens."""

    logprobs: tuple[tensor_pb2.PositionLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Completed:
    """The request ended well."""

    completion: executor_pb2.Completion


Event = MissingItems | PromptScores | TokenOutput | Completed


class StreamEnd(Protocol):
    """What a request needs of its stream."""

    def send_tensor(self, handle: int, item_index: int, tensor_index: int, array: np.ndarray) -> None:
        """Queue a tensor."""

    def cancel(self, handle: int) -> None:
        """Send Cancel and forget unsent chunks."""

    def stop(self, handle: int) -> None:
        """Send Stop."""


class RemoteRequest:
    """A started request. Its user reads `next_events` and, at the end, always calls `release`."""

    def __init__(self, handle: int, stream: StreamEnd) -> None:
        self.handle = handle
        self._stream = stream
        self._events: deque[Event] = deque()
        self._error: DiptychError | None = None
        self._wake_up = asyncio.Event()
        self._ended = False
        self._cancelled = False

    # --- for the request's user -------------------------------------------------------------------

    async def next_events(self) -> list[Event]:
        """Everything that arrived since the last call, at least one event; raises the request's error after it."""
        await self._wake_up.wait()
        events = list(self._events)
        self._events.clear()
        if not events:
            assert self._error is not None
            raise self._error
        if self._error is None:
            self._wake_up.clear()
        return events

    def send_tensor(self, item_index: int, tensor_index: int, array: np.ndarray) -> None:
        """Queue one tensor of a missing item."""
        if not (self._ended or self._cancelled):
            self._stream.send_tensor(self.handle, item_index, tensor_index, array)

    def fail(self, error: DiptychError) -> None:
        """End the request for its user; what arrived before is still delivered."""
        if self._error is None:
            self._error = error
            self._wake_up.set()

    def stop(self) -> None:
        """The answer is complete as it is: the executor is told at once, and `completion` is what it says of it."""
        if not self._ended:
            self._stream.stop(self.handle)

    async def completion(self, patience: float) -> executor_pb2.Completion | None:
        """The end of a stopped request; tokens that come before it are passed over.

        None if it does not come within `patience` seconds, or the request fails: what the client has is whole.
        """
        timer = self.fail_after(patience, lambda: DeadlineError("no word of a stopped request", stage="executor"))
        try:
            while True:
                for event in await self.next_events():
                    if isinstance(event, Completed):
                        return event.completion
        except DiptychError as error:
            LOG.info("a stopped request ended without its usage: %s", error.message)
            return None
        finally:
            if timer is not None:
                timer.cancel()

    def release(self) -> None:
        """The user is done: if the executor is not, it is told to stop at once."""
        if not (self._ended or self._cancelled):
            self._cancelled = True
            self._stream.cancel(self.handle)

    def fail_after(self, seconds: float | None, make_error: Callable[[], DiptychError]) -> asyncio.TimerHandle | None:
        """Fail in `seconds` from now, unless the handle returned is cancelled before."""
        if seconds is None:
            return None
        return asyncio.get_running_loop().call_later(seconds, lambda: self.fail(make_error()))

    # --- for the stream ---------------------------------------------------------------------------

    def receive(self, event: Event) -> None:
        """Something arrived; after `release` nobody reads it."""
        if not self._cancelled:
            self._events.append(event)
            self._wake_up.set()

    def end(self, final: executor_pb2.Final) -> None:
        """The one last message arrived."""
        self._ended = True
        if final.WhichOneof("outcome") == "completion":
            self.receive(Completed(final.completion))
        else:
            self.fail(RemoteError(final.status))

    def lose(self, error: DiptychError) -> None:
        """The stream broke: nothing more arrives and nothing can be sent."""
        self._ended = True
        self.fail(error)
