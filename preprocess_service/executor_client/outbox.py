"""What one stream still has to send: control messages first, then chunks of all requests in turn."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from diptych.v1 import executor_pb2
from diptych.wire.framing import CHUNK_BYTES, ItemChunk, tensor_bytes


@dataclass(slots=True)
class _Piece:
    """A tensor of which the bytes from `offset` on are unsent."""

    item_index: int
    tensor_index: int
    data: memoryview
    offset: int = 0


@dataclass(slots=True)
class _Transfer:
    """One request's unsent tensors and the bytes its credit still allows."""

    pieces: deque[_Piece] = field(default_factory=deque)
    credit: int = 0

    @property
    def is_sendable(self) -> bool:
        return bool(self.pieces) and self.credit > 0


class Outbox:
    """The unsent messages of one stream, for one writer.

    Requests with unsent bytes and credit take turns, a chunk each, so one request's pixels never delay
    another's. Control messages overtake all chunks.
    """

    def __init__(self) -> None:
        self._control: deque[executor_pb2.ExecuteRequest] = deque()
        self._transfers: dict[int, _Transfer] = {}
        self._turns: deque[int] = deque()
        self._has_work = asyncio.Event()

    def add_control(self, message: executor_pb2.ExecuteRequest) -> None:
        """Queue a Start, Stop or Cancel ahead of every chunk."""
        self._control.append(message)
        self._has_work.set()

    def add_tensor(self, handle: int, item_index: int, tensor_index: int, array: np.ndarray) -> None:
        """Queue a contiguous tensor; it must not change until it is sent. One without elements has no chunks."""
        if array.nbytes:
            self._transfer(handle).pieces.append(_Piece(item_index, tensor_index, tensor_bytes(array)))
            self._take_turn(handle)

    def add_credit(self, handle: int, num_bytes: int) -> None:
        """Allow that many more bytes of the request."""
        self._transfer(handle).credit += num_bytes
        self._take_turn(handle)

    def drop(self, handle: int) -> None:
        """Forget what is unsent of a request."""
        self._transfers.pop(handle, None)

    async def next(self) -> executor_pb2.ExecuteRequest | ItemChunk:
        """The next message to send, as soon as there is one."""
        while True:
            if self._control:
                return self._control.popleft()
            if (chunk := self._next_chunk()) is not None:
                return chunk
            self._has_work.clear()
            await self._has_work.wait()

    def _transfer(self, handle: int) -> _Transfer:
        return self._transfers.setdefault(handle, _Transfer())

    def _take_turn(self, handle: int) -> None:
        if self._transfers[handle].is_sendable and handle not in self._turns:
            self._turns.append(handle)
            self._has_work.set()

    def _next_chunk(self) -> ItemChunk | None:
        while self._turns:
            handle = self._turns.popleft()
            transfer = self._transfers.get(handle)
            if transfer is not None and transfer.is_sendable:
                chunk = _cut(handle, transfer)
                self._take_turn(handle)
                return chunk
        return None


def _cut(handle: int, transfer: _Transfer) -> ItemChunk:
    """The next chunk of a transfer: as much as chunk size, credit and tensor allow."""
    piece = transfer.pieces[0]
    size = min(CHUNK_BYTES, transfer.credit, len(piece.data) - piece.offset)
    data = piece.data[piece.offset : piece.offset + size]
    chunk = ItemChunk(handle, piece.item_index, piece.tensor_index, piece.offset, data)
    piece.offset += size
    transfer.credit -= size
    if piece.offset == len(piece.data):
        transfer.pieces.popleft()
    return chunk
