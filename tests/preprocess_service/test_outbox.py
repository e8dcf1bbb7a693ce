"""What a stream sends next: control first, requests in turn, never more than the credit."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from diptych.v1 import executor_pb2
from diptych.wire.framing import CHUNK_BYTES, ItemChunk
from preprocess_service.executor_client.outbox import Outbox


async def drain(outbox: Outbox) -> list[ItemChunk | executor_pb2.ExecuteRequest]:
    """Everything that can be sent now."""
    sent = []
    while True:
        task = asyncio.create_task(outbox.next())
        await asyncio.sleep(0)
        if not task.done():
            task.cancel()
            return sent
        sent.append(task.result())


def cancel(handle: int) -> executor_pb2.ExecuteRequest:
    return executor_pb2.ExecuteRequest(handle=handle, cancel=executor_pb2.Cancel())


async def test_requests_take_turns() -> None:
    outbox = Outbox()
    for handle in (1, 2, 3):
        outbox.add_tensor(handle, 0, 0, np.zeros(3 * CHUNK_BYTES, np.uint8))
        outbox.add_credit(handle, 10 * CHUNK_BYTES)
    sent = await drain(outbox)
    assert [chunk.handle for chunk in sent] == [1, 2, 3] * 3
    assert [chunk.offset for chunk in sent if chunk.handle == 2] == [0, CHUNK_BYTES, 2 * CHUNK_BYTES]


async def test_control_overtakes_chunks() -> None:
    outbox = Outbox()
    outbox.add_credit(1, 10 * CHUNK_BYTES)
    outbox.add_tensor(1, 0, 0, np.zeros(4 * CHUNK_BYTES, np.uint8))
    assert isinstance(await outbox.next(), ItemChunk)
    outbox.add_control(cancel(2))
    assert await outbox.next() == cancel(2)
    assert isinstance(await outbox.next(), ItemChunk)


async def test_nothing_beyond_the_credit() -> None:
    outbox = Outbox()
    outbox.add_tensor(1, 0, 0, np.arange(10, dtype=np.int32))
    assert await drain(outbox) == []
    outbox.add_credit(1, 7)
    (first,) = await drain(outbox)
    outbox.add_credit(1, 100)
    (second,) = await drain(outbox)
    assert (first.offset, second.offset) == (0, 7)
    np.testing.assert_array_equal(
        np.frombuffer(bytes(first.data) + bytes(second.data), np.int32), np.arange(10, dtype=np.int32)
    )


async def test_tensors_of_one_request_keep_their_order() -> None:
    outbox = Outbox()
    outbox.add_credit(1, 1000)
    outbox.add_tensor(1, 0, 0, np.zeros((2, 3), np.float32))
    outbox.add_tensor(1, 0, 1, np.zeros((), np.int64))
    outbox.add_tensor(1, 1, 0, np.zeros((0, 5), np.uint8))
    outbox.add_tensor(1, 1, 1, np.ones(3, np.bool_))
    sent = await drain(outbox)
    assert [(c.item_index, c.tensor_index, len(c.data)) for c in sent] == [(0, 0, 24), (0, 1, 8), (1, 1, 3)]


@pytest.mark.parametrize("num_sent", [0, 1])
async def test_dropped_requests_send_nothing_more(num_sent: int) -> None:
    outbox = Outbox()
    outbox.add_credit(1, 10 * CHUNK_BYTES)
    outbox.add_tensor(1, 0, 0, np.zeros(4 * CHUNK_BYTES, np.uint8))
    for _ in range(num_sent):
        await outbox.next()
    outbox.drop(1)
    assert await drain(outbox) == []
