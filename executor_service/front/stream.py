"""One `Execute` stream: its handles, what it reads, and what it answers, tokens packed by step."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from itertools import count

from diptych.service.errors import DiptychError, InternalError, InvalidInputError, OverloadedError
from diptych.v1 import executor_pb2, tensor_pb2
from diptych.wire.framing import ItemChunk
from executor_service.engine.messages import TokenLogprobs
from executor_service.front.credit import STREAM_WINDOW, Window
from executor_service.front.front import Front
from executor_service.front.item_store import Sender
from executor_service.front.request import FrontRequest

LOG = logging.getLogger("diptych.executor")
MAX_UNREAD = 4096
"""Entries (tokens, log probabilities, control messages) that may wait for the peer before it is not read any more."""
MAX_KEPT = 1024 * MAX_UNREAD
"""And those that are kept for such a peer before its stream ends: what already runs goes on to make some."""
MAX_ENDED_HANDLES = 65536
"""Handles a stream remembers after their Final, so that late chunks are told from wrong ones."""


class ExecuteStream:
    """Implements the front's `Outlet`. All of it runs in the event loop."""

    _numbers = count()

    def __init__(self, front: Front, peer: str) -> None:
        self._front = front
        self.sender = Sender(peer, next(self._numbers))
        self.window = Window(STREAM_WINDOW)
        self._live: dict[int, FrontRequest] = {}
        self._ended: dict[int, None] = {}
        self._outgoing: deque[tuple[executor_pb2.ExecuteResponse, int]] = deque()
        self._num_unread = 0
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._finals: list[executor_pb2.Final] = []
        # The step's outputs in lists: filling a message field by field takes several times as long.
        self._handles: list[int] = []
        self._token_ids: list[int] = []
        self._logprobs: list[executor_pb2.IndexedLogprobs] = []
        self._news = asyncio.Event()
        self.is_half_closed = False
        self._failure: Exception | None = None

    # --- reading ------------------------------------------------------------------------------------

    def handle(self, request: executor_pb2.ExecuteRequest | ItemChunk) -> None:
        """Take one message; what is wrong with it ends its request and no other."""
        try:
            self._dispatch(request)
        except DiptychError as error:
            self._end(request.handle, error)
        except Exception:
            LOG.exception("unexpected error with a message for handle %d", request.handle)
            stage = "receive" if isinstance(request, ItemChunk) else "admit"
            self._end(request.handle, InternalError("internal error; the executor's log has the details", stage=stage))

    def half_close(self) -> None:
        """The sender has nothing more to say; what runs is answered to its end."""
        self.is_half_closed = True
        for request in list(self._live.values()):
            self._front.end_of_chunks(request)
        self._news.set()

    def fail(self, error: Exception) -> None:
        """The stream cannot be read any further: `responses` ends with this error."""
        self._failure = error
        self._has_room.set()
        self._news.set()

    def lose(self) -> None:
        """The stream is gone: its requests end, and no others."""
        for request in list(self._live.values()):
            self._front.cancel(request)

    def _dispatch(self, request: executor_pb2.ExecuteRequest | ItemChunk) -> None:
        if isinstance(request, ItemChunk):
            if (target := self._find(request.handle, "a chunk")) is not None:
                self._front.receive(target, request)
            return
        match request.WhichOneof("message"):
            case "start":
                self._open(request.handle, request.start)
            case "cancel":
                if (target := self._find(request.handle, "a cancel")) is not None:
                    self._front.cancel(target)
            case "stop":
                if (target := self._find(request.handle, "a stop")) is not None:
                    self._front.stop_generating(target)
            case _:
                raise InvalidInputError("a message is neither start, chunk, cancel nor stop", stage="admit")

    def _open(self, handle: int, start: executor_pb2.Start) -> None:
        if handle in self._live:
            twice = InvalidInputError(f"handle {handle} was started while it was live", stage="admit")
            self._front.end(self._live[handle], twice)
            return
        self._ended.pop(handle, None)
        request = self._front.open(handle, start, self)
        if request.error is None:
            self._live[handle] = request

    def _end(self, handle: int, error: DiptychError) -> None:
        """End a request whether it had got as far as the front or not."""
        if (request := self._live.get(handle)) is not None:
            self._front.end(request, error)
        else:
            self.put_final(executor_pb2.Final(handle=handle, status=error.to_status()))

    def _find(self, handle: int, what: str) -> FrontRequest | None:
        """The live request; None if it has just ended; InvalidInputError if there never was one."""
        if handle in self._live:
            return self._live[handle]
        if handle in self._ended:
            return None
        raise InvalidInputError(f"{what} came for handle {handle}, which was not started", stage="receive")

    # --- writing ------------------------------------------------------------------------------------

    async def wait_for_room(self) -> None:
        """Until the peer has read most of what waits for it: who does not listen is not listened to."""
        if self._num_unread > MAX_UNREAD:
            self._has_room.clear()
            await self._has_room.wait()

    def put(self, response: executor_pb2.ExecuteResponse, num_entries: int = 1) -> None:
        """Queue a message."""
        if self._failure is not None:
            return
        self._outgoing.append((response, num_entries))
        self._num_unread += num_entries
        self._news.set()
        if self._num_unread > MAX_KEPT:
            self._give_up()

    def _give_up(self) -> None:
        """End the stream of a peer that does not read; what waits for it is dropped."""
        self.fail(
            OverloadedError(
                f"{self._num_unread} entries of answers were not read; at most {MAX_KEPT} are kept",
                stage="send",
                limit=MAX_KEPT,
                actual=self._num_unread,
            )
        )
        self._outgoing.clear()
        self._num_unread = 0

    def put_prompt_logprobs(self, handle: int, entries: list[TokenLogprobs]) -> None:
        """Queue a message of their own."""
        message = executor_pb2.PromptLogprobs(handle=handle, logprobs=[_position_logprobs(entry) for entry in entries])
        self.put(executor_pb2.ExecuteResponse(prompt_logprobs=message), sum(1 + len(entry.top) for entry in entries))

    def put_token(self, handle: int, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """Add a token to the step's message."""
        if logprobs is not None:
            entry = executor_pb2.IndexedLogprobs(index=len(self._handles), logprobs=_position_logprobs(logprobs))
            self._logprobs.append(entry)
        self._handles.append(handle)
        self._token_ids.append(token_id)

    def put_final(self, final: executor_pb2.Final) -> None:
        """Queue a Final behind the step's tokens, which are complete by then."""
        self._live.pop(final.handle, None)
        self._ended[final.handle] = None
        if len(self._ended) > MAX_ENDED_HANDLES:
            del self._ended[next(iter(self._ended))]
        self._finals.append(final)
        self.flush()

    def flush(self) -> None:
        """One message with all of a step's tokens, then the Finals."""
        if self._handles:
            step = executor_pb2.StepOutputs(handles=self._handles, token_ids=self._token_ids, logprobs=self._logprobs)
            num_logprobs = sum(1 + len(entry.logprobs.top) for entry in self._logprobs)
            self.put(executor_pb2.ExecuteResponse(step_outputs=step), len(self._handles) + num_logprobs)
            self._handles, self._token_ids, self._logprobs = [], [], []
        for final in self._finals:
            self.put(executor_pb2.ExecuteResponse(final=final))
        self._finals.clear()

    async def responses(self) -> AsyncIterator[executor_pb2.ExecuteResponse]:
        """What goes back, until the sender has half-closed and every request has its Final; raises what `fail` got."""
        while True:
            while self._outgoing:
                response, num_entries = self._outgoing.popleft()
                self._num_unread -= num_entries
                if self._num_unread <= MAX_UNREAD:
                    self._has_room.set()
                yield response
            if self._failure is not None:
                raise self._failure
            if self.is_half_closed and not self._live:
                return
            await self._news.wait()
            self._news.clear()


def _position_logprobs(entry: TokenLogprobs) -> tensor_pb2.PositionLogprobs:
    return tensor_pb2.PositionLogprobs(
        chosen=tensor_pb2.TokenLogprob(token_id=entry.token_id, logprob=entry.logprob),
        top=[tensor_pb2.TokenLogprob(token_id=token, logprob=value) for token, value in entry.top],
    )
