"""Reassembly of a request's tensors from chunks, under byte credit, straight into the arena."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from diptych.service.errors import InvalidInputError
from diptych.wire.framing import CHUNK_BYTES, ItemChunk
from executor_service.engine.messages import ItemSlots, TensorSlot
from executor_service.front.admission import AdmittedItem
from executor_service.front.arena import Region, aligned

CREDIT_WINDOW: Final = 4 * 1024 * 1024
"""Bytes of one request that may be on their way."""


@dataclass
class _Incoming:
    """One tensor: where it goes, and how much of it is there."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    place: int
    num_received: int = 0


class Assembly:
    """The tensors of one request on their way into its region."""

    def __init__(self, items: Sequence[AdmittedItem]) -> None:
        self._items = items
        self._incoming: list[list[_Incoming]] = []
        place = 0
        for item in items:
            tensors = []
            for name, spec in item.tensors:
                tensors.append(_Incoming(name, spec.dtype, spec.shape, spec.num_bytes, place))
                place += aligned(spec.num_bytes)
            self._incoming.append(tensors)
        self.region_bytes = place
        self.num_bytes = sum(tensor.num_bytes for tensors in self._incoming for tensor in tensors)
        self._num_received = 0
        self._num_granted = 0

    @property
    def is_complete(self) -> bool:
        """Whether every byte is there."""
        return self._num_received == self.num_bytes

    def grant(self) -> int:
        """Bytes of credit to give now; 0 while enough is outstanding, so that grants come in large steps."""
        outstanding = self._num_granted - self._num_received
        more = min(CREDIT_WINDOW - outstanding, self.num_bytes - self._num_granted)
        if more <= 0 or (self._num_granted and more < min(CREDIT_WINDOW // 2, self.num_bytes - self._num_granted)):
            return 0
        self._num_granted += more
        return more

    def accept(self, chunk: ItemChunk, view: memoryview, region: Region | None) -> None:
        """Copy a chunk to its place; InvalidInputError if it is not the next one of its tensor, or beyond credit."""
        size = len(chunk.data)
        tensor = self._tensor(chunk)
        if not 0 < size <= CHUNK_BYTES:
            raise _refuse(chunk, f"a chunk has {size} bytes; it may have 1 to {CHUNK_BYTES}", CHUNK_BYTES, size)
        if chunk.offset != tensor.num_received:
            message = f"a chunk of {tensor.name} starts at byte {chunk.offset}; byte {tensor.num_received} is next"
            raise _refuse(chunk, message, tensor.num_received, chunk.offset)
        if chunk.offset + size > tensor.num_bytes:
            message = f"{tensor.name} has {tensor.num_bytes} bytes; a chunk reaches to byte {chunk.offset + size}"
            raise _refuse(chunk, message, tensor.num_bytes, chunk.offset + size)
        if region is None or self._num_received + size > self._num_granted:
            message = f"{self._num_received + size} bytes sent, credit was given for {self._num_granted}"
            raise _refuse(chunk, message, self._num_granted, self._num_received + size)
        start = region.offset + tensor.place + chunk.offset
        view[start : start + size] = chunk.data
        tensor.num_received += size
        self._num_received += size

    def slots(self, region: Region) -> tuple[ItemSlots, ...]:
        """What the engine is told: every item and where its tensors are."""
        return tuple(
            ItemSlots(
                item.placeholder.offset,
                item.placeholder.length,
                item.info,
                tuple(
                    TensorSlot(tensor.name, tensor.dtype, tensor.shape, region.offset + tensor.place, tensor.num_bytes)
                    for tensor in tensors
                ),
            )
            for item, tensors in zip(self._items, self._incoming, strict=True)
        )

    def _tensor(self, chunk: ItemChunk) -> _Incoming:
        if chunk.item_index >= len(self._incoming):
            message = f"a chunk is for item {chunk.item_index}; the request has {len(self._incoming)} items"
            raise _refuse(chunk, message, len(self._incoming), chunk.item_index)
        tensors = self._incoming[chunk.item_index]
        if chunk.tensor_index >= len(tensors):
            message = f"a chunk is for tensor {chunk.tensor_index}; the item has {len(tensors)} tensors"
            raise _refuse(chunk, message, len(tensors), chunk.tensor_index)
        return tensors[chunk.tensor_index]


def _refuse(chunk: ItemChunk, message: str, limit: int, actual: int) -> InvalidInputError:
    return InvalidInputError(message, stage="receive", item=chunk.item_index, limit=limit, actual=actual)
