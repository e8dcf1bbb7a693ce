"""Messages to the engine process: whole and in order, whatever the pipe takes, and nobody waits for it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import pytest

from executor_service.engine.messages import Abort, SamplingParams, Submit
from executor_service.front.engine_outbox import EngineOutbox
from tests.stand_in_executor import eventually

FAR_MORE_THAN_A_PIPE_TAKES = 1 << 20


@pytest.fixture
def pipe() -> Iterator[tuple[Connection, Connection]]:
    ours, theirs = Pipe(duplex=True)
    with ours, theirs:
        yield ours, theirs


def submit(number: int, num_tokens: int = 10) -> Submit:
    return Submit(number, list(range(number, number + num_tokens)), (), SamplingParams(max_tokens=3))


async def test_a_connection_reads_what_is_sent(pipe: tuple[Connection, Connection]) -> None:
    ours, theirs = pipe
    outbox, messages = EngineOutbox(ours), [submit(1), Abort((1,)), submit(2)]
    for message in messages:
        outbox.send(message)
    assert outbox.num_unsent_bytes == 0, "the pipe is empty: everything went out at once"
    assert [theirs.recv() for _ in messages] == messages
    outbox.close()
    theirs.send("and back")
    assert ours.recv() == "and back", "the connection is still its owner's"


async def test_a_full_pipe_keeps_nobody_waiting(pipe: tuple[Connection, Connection]) -> None:
    """The engine reads only between its steps; what it is sent then arrives whole and in order."""
    ours, theirs = pipe
    outbox, messages = EngineOutbox(ours), [submit(n, FAR_MORE_THAN_A_PIPE_TAKES) for n in range(3)]
    for message in messages:
        outbox.send(message)
    assert outbox.num_unsent_bytes > FAR_MORE_THAN_A_PIPE_TAKES
    assert [await asyncio.to_thread(theirs.recv) for _ in messages] == messages
    await eventually(lambda: outbox.num_unsent_bytes == 0)
    outbox.send(Abort((7,)))
    assert theirs.recv() == Abort((7,))
    outbox.close()


async def test_an_engine_that_is_gone(pipe: tuple[Connection, Connection]) -> None:
    """That is for the reader to notice, who says so to everybody."""
    ours, theirs = pipe
    outbox = EngineOutbox(ours)
    outbox.send(submit(1, FAR_MORE_THAN_A_PIPE_TAKES))
    assert outbox.num_unsent_bytes
    theirs.close()
    await eventually(lambda: outbox.num_unsent_bytes == 0)
    outbox.send(submit(2))
    assert outbox.num_unsent_bytes == 0
    outbox.close()


async def test_closing_drops_what_is_unsent(pipe: tuple[Connection, Connection]) -> None:
    ours, _ = pipe
    before = len(os.listdir("/proc/self/fd"))
    outbox = EngineOutbox(ours)
    outbox.send(submit(1, FAR_MORE_THAN_A_PIPE_TAKES))
    outbox.close()
    assert outbox.num_unsent_bytes == 0
    assert len(os.listdir("/proc/self/fd")) == before
