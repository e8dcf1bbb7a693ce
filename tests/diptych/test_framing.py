"""Hand-framed chunks and generated code read each other's bytes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from diptych.v1 import executor_pb2
from diptych.wire.framing import CHUNK_BYTES, ItemChunk, decode_request, encode_chunk, encode_request, split_tensor

uint32 = st.integers(0, 2**32 - 1)


def generated(chunk: ItemChunk) -> executor_pb2.ExecuteRequest:
    inner = executor_pb2.ItemChunk(
        item_index=chunk.item_index, tensor_index=chunk.tensor_index, offset=chunk.offset, data=bytes(chunk.data)
    )
    return executor_pb2.ExecuteRequest(handle=chunk.handle, item_chunk=inner)


@given(uint32, uint32, uint32, st.integers(0, 2**64 - 1), st.binary(max_size=300))
def test_each_form_reads_the_other(handle: int, item: int, tensor: int, offset: int, data: bytes) -> None:
    chunk = ItemChunk(handle, item, tensor, offset, memoryview(data))
    assert executor_pb2.ExecuteRequest.FromString(encode_chunk(chunk)) == generated(chunk)
    assert decode_request(encode_chunk(chunk)) == chunk
    assert decode_request(generated(chunk).SerializeToString()) == chunk


@given(uint32)
def test_other_messages_pass_through(handle: int) -> None:
    cancel = executor_pb2.ExecuteRequest(handle=handle, cancel=executor_pb2.Cancel())
    assert decode_request(encode_request(cancel)) == cancel


@given(st.binary(max_size=80))
def test_garbage_never_becomes_a_chunk_that_protobuf_would_not_read(data: bytes) -> None:
    try:
        expected = executor_pb2.ExecuteRequest.FromString(data)
    except Exception as error:
        expected = type(error)
    try:
        got = decode_request(data)
    except Exception as error:
        got = type(error)
    if isinstance(got, ItemChunk):
        assert expected == generated(got)
    else:
        assert got == expected


def test_chunks_are_views_and_add_up() -> None:
    tensor = np.arange(3 * CHUNK_BYTES // 2 + 5, dtype=np.uint8)
    chunks = list(split_tensor(1, 2, 3, memoryview(tensor).cast("B")))
    assert [len(chunk.data) for chunk in chunks] == [CHUNK_BYTES, CHUNK_BYTES // 2 + 5]
    assert b"".join(chunk.data for chunk in chunks) == tensor.tobytes()
    tensor[0] = 77
    assert chunks[0].data[0] == 77
