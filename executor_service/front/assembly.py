"""Reassembly of one item's tensors from chunks, straight into the arena, and the digest of what arrived."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from diptych.service.errors import InvalidInputError
from diptych.wire.framing import CHUNK_BYTES, ItemChunk
from executor_service.engine.messages import TensorSlot
from executor_service.front.admission import AdmittedItem
from executor_service.front.arena import Region, aligned
from registry import ItemLayout, TensorSpec

_EXPONENTS: Final[dict[str, np.unsignedinteger[Any]]] = {
    "float16": np.uint16(0x7C00),
    "bfloat16": np.uint16(0x7F80),
    "float32": np.uint32(0x7F80_0000),
    "float64": np.uint64(0x7FF0_0000_0000_0000),
}
"""Exponent bits of IEEE 754 formats; where all are set, the value is an infinity or no number."""


@dataclass
class _Incoming:
    """One tensor: where it goes, how much of it is there, and the hash of that."""

    name: str
    spec: TensorSpec
    place: int
    num_received: int = 0
    hasher: Any = field(default_factory=hashlib.sha256)

    @property
    def is_complete(self) -> bool:
        return self.num_received == self.spec.num_bytes


class ItemAssembly:
    """The tensors of item `index` on their way into `region` of the arena, whose memory is `view`.

    Tensors that came inline with the Start are there at once.
    """

    def __init__(self, index: int, item: AdmittedItem, view: memoryview, region: Region) -> None:
        self._index, self._view, self._region = index, view, region
        self._incoming: list[_Incoming] = []
        place = 0
        for name, spec in item.tensors:
            self._incoming.append(_Incoming(name, spec, place))
            place += aligned(spec.num_bytes)
        self.num_bytes = sum(spec.num_bytes for name, spec in item.tensors if name not in item.inline)
        for tensor in self._incoming:
            if tensor.name in item.inline:
                self._write(tensor, memoryview(item.inline[tensor.name]))

    @property
    def is_complete(self) -> bool:
        """Whether every byte is there."""
        return all(tensor.is_complete for tensor in self._incoming)

    def check(self, chunk: ItemChunk) -> None:
        """InvalidInputError if the chunk is not the next one of its tensor."""
        size = len(chunk.data)
        tensor = self._tensor(chunk)
        if not 0 < size <= CHUNK_BYTES:
            raise refusal(chunk, f"a chunk has {size} bytes; it may have 1 to {CHUNK_BYTES}", CHUNK_BYTES, size)
        if chunk.offset != tensor.num_received:
            message = f"a chunk of {tensor.name} starts at byte {chunk.offset}; byte {tensor.num_received} is next"
            raise refusal(chunk, message, tensor.num_received, chunk.offset)
        if chunk.offset + size > tensor.spec.num_bytes:
            message = f"{tensor.name} has {tensor.spec.num_bytes} bytes; a chunk reaches to byte {chunk.offset + size}"
            raise refusal(chunk, message, tensor.spec.num_bytes, chunk.offset + size)

    def write(self, chunk: ItemChunk) -> None:
        """Copy a checked chunk to its place."""
        self._write(self._tensor(chunk), chunk.data)

    def check_values(self) -> None:
        """InvalidInputError for values that the dtype's bytes can say and a tensor must not have; once complete.

        A NaN or an infinity would spread through the model's batch, and what a model makes of a bool that is neither 0
        nor 1 nobody knows.
        """
        for tensor in self._incoming:
            start = self._region.offset + tensor.place
            # In a function of its own: the error's traceback would keep a view of the arena alive.
            if (flaw := _flaw(self._view[start : start + tensor.spec.num_bytes], tensor.spec.dtype)) is not None:
                raise InvalidInputError(
                    f"item {self._index}: {tensor.name} has {flaw}", stage="receive", item=self._index
                )

    def slots(self) -> tuple[TensorSlot, ...]:
        """Where the tensors are."""
        return tuple(
            TensorSlot(tensor.name, tensor.spec.dtype, tensor.spec.shape, self._region.offset + tensor.place,
                       tensor.spec.num_bytes)
            for tensor in self._incoming
        )  # fmt: skip

    def tensors_digest(self) -> bytes:
        """SHA-256 over names, dtypes, shapes and the SHA-256 of the bytes, by name; once complete."""
        hasher = hashlib.sha256()
        for tensor in sorted(self._incoming, key=lambda tensor: tensor.name):
            hasher.update(repr((tensor.name, tensor.spec.dtype, tensor.spec.shape)).encode())
            hasher.update(tensor.hasher.digest())
        return hasher.digest()

    def _write(self, tensor: _Incoming, data: memoryview) -> None:
        start = self._region.offset + tensor.place + tensor.num_received
        self._view[start : start + len(data)] = data
        # Hashed where it now is: nobody but us can change it there.
        tensor.hasher.update(self._view[start : start + len(data)])
        tensor.num_received += len(data)

    def _tensor(self, chunk: ItemChunk) -> _Incoming:
        if chunk.tensor_index >= len(self._incoming):
            message = f"a chunk is for tensor {chunk.tensor_index}; the item has {len(self._incoming)} tensors"
            raise refusal(chunk, message, len(self._incoming), chunk.tensor_index)
        return self._incoming[chunk.tensor_index]


def _flaw(data: memoryview, dtype: str) -> str | None:
    """What is wrong with a tensor's values."""
    if dtype == "bool":
        return "values that are neither 0 nor 1" if (np.frombuffer(data, dtype=np.uint8) > 1).any() else None
    if (mask := _EXPONENTS.get(dtype)) is None:
        return None
    words = np.frombuffer(data, dtype=mask.dtype)
    return "values that are not finite" if ((words & mask) == mask).any() else None


def content_digest(tensors_digest: bytes, modality: str, layout: ItemLayout) -> bytes:
    """SHA-256 over all that an item's features depend on: its tensors and what its layout makes of its size."""
    hasher = hashlib.sha256(tensors_digest)
    hasher.update(repr((modality, layout.num_tokens)).encode())
    for name in sorted(layout.constants):
        constant = layout.constants[name]
        hasher.update(repr((name, constant.dtype.str, constant.shape)).encode())
        hasher.update(constant.tobytes())
    return hasher.digest()


def refusal(chunk: ItemChunk, message: str, limit: int, actual: int) -> InvalidInputError:
    """What a wrong chunk is answered with."""
    return InvalidInputError(message, stage="receive", item=chunk.item_index, limit=limit, actual=actual)
