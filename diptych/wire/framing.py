"""Hand-framed item chunks: the one message whose bytes we write ourselves.

An `ExecuteRequest` with an `ItemChunk` is a short header and the tensor's own bytes; framing it by hand
saves two copies of the payload on either side. The bytes are those protobuf would accept and produce, so
either side may use the generated code instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from google.protobuf.message import DecodeError

from diptych.v1 import executor_pb2

CHUNK_BYTES: Final = 1024 * 1024
"""Largest piece of a tensor in one chunk."""

_HANDLE_TAG: Final = 0x08  # field 1, varint
_ITEM_CHUNK_TAG: Final = 0x1A  # field 3, length-delimited
_ITEM_INDEX_TAG: Final = 0x08
_TENSOR_INDEX_TAG: Final = 0x10
_OFFSET_TAG: Final = 0x18
_DATA_TAG: Final = 0x22  # field 4, length-delimited


@dataclass(frozen=True, slots=True)
class ItemChunk:
    """A piece of one tensor; `data` is a view, valid as long as its owner is."""

    handle: int
    item_index: int
    tensor_index: int
    offset: int
    data: memoryview


def tensor_bytes(array: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, without copying."""
    # Reshaped because a view of bytes needs at least one axis.
    return array.reshape(-1).view(np.uint8).data


def split_tensor(handle: int, item_index: int, tensor_index: int, data: memoryview) -> Iterator[ItemChunk]:
    """The chunks of one tensor's bytes, in order, without copying."""
    for offset in range(0, len(data), CHUNK_BYTES):
        yield ItemChunk(handle, item_index, tensor_index, offset, data[offset : offset + CHUNK_BYTES])


def encode_request(request: executor_pb2.ExecuteRequest | ItemChunk) -> bytes:
    """The serializer of `Execute` requests."""
    return encode_chunk(request) if isinstance(request, ItemChunk) else request.SerializeToString()


def decode_request(data: bytes) -> executor_pb2.ExecuteRequest | ItemChunk:
    """The deserializer of `Execute` requests; chunks in our own framing keep a view into `data`."""
    chunk = _decode_chunk(memoryview(data))
    return chunk if chunk is not None else _generic(executor_pb2.ExecuteRequest.FromString(data))


def encode_chunk(chunk: ItemChunk) -> bytes:
    """One join of the header and the tensor's bytes."""
    inner = bytearray()
    for tag, value in (
        (_ITEM_INDEX_TAG, chunk.item_index),
        (_TENSOR_INDEX_TAG, chunk.tensor_index),
        (_OFFSET_TAG, chunk.offset),
        (_DATA_TAG, len(chunk.data)),
    ):
        inner.append(tag)
        _put_varint(inner, value)
    outer = bytearray([_HANDLE_TAG])
    _put_varint(outer, chunk.handle)
    outer.append(_ITEM_CHUNK_TAG)
    _put_varint(outer, len(inner) + len(chunk.data))
    return b"".join((outer, inner, chunk.data))


def _generic(request: executor_pb2.ExecuteRequest) -> executor_pb2.ExecuteRequest | ItemChunk:
    """A chunk in another encoder's framing becomes an ItemChunk too."""
    if request.WhichOneof("message") != "item_chunk":
        return request
    chunk = request.item_chunk
    return ItemChunk(request.handle, chunk.item_index, chunk.tensor_index, chunk.offset, memoryview(chunk.data))


def _decode_chunk(data: memoryview) -> ItemChunk | None:
    """The chunk, if `data` is exactly our framing; None for everything else."""
    try:
        handle, at = _tagged_varint(data, 0, _HANDLE_TAG)
        length, at = _tagged_varint(data, at, _ITEM_CHUNK_TAG)
        if at + length != len(data):
            return None
        item_index, at = _tagged_varint(data, at, _ITEM_INDEX_TAG)
        tensor_index, at = _tagged_varint(data, at, _TENSOR_INDEX_TAG)
        offset, at = _tagged_varint(data, at, _OFFSET_TAG)
        length, at = _tagged_varint(data, at, _DATA_TAG)
    except DecodeError:
        return None
    if at + length != len(data) or max(handle, item_index, tensor_index) >= 1 << 32:
        return None
    return ItemChunk(handle, item_index, tensor_index, offset, data[at:])


def _put_varint(out: bytearray, value: int) -> None:
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def _tagged_varint(data: memoryview, at: int, tag: int) -> tuple[int, int]:
    """(value, position after it); DecodeError if the tag is another or the varint is not whole."""
    if at >= len(data) or data[at] != tag:
        raise DecodeError("another field")
    value = shift = 0
    for position in range(at + 1, min(at + 11, len(data))):
        byte = data[position]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position + 1
        shift += 7
    raise DecodeError("a varint without end")
