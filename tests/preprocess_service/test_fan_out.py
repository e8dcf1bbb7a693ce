"""Several answers side by side: who does not read is not worked ahead for, and whoever goes away leaves nothing."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from diptych.v1 import tensor_pb2
from preprocess_service.fan_out import MAX_UNREAD, Piece, fan_out, nth_call
from preprocess_service.requests import Delta, Ended, GenerateCall, Prompt

NUM_PIECES = 3 * MAX_UNREAD
"""Of each answer, its end included: far more than may wait."""


class Answers:
    """Answers that are ready at once; notes how far each has been worked on, and which have ended."""

    def __init__(self) -> None:
        self.made: Counter[int] = Counter()
        self.closed: set[int] = set()

    @property
    def num_made(self) -> int:
        """Pieces of all answers that were handed out, or are about to be."""
        return self.made.total()

    async def answer(self, index: int) -> AsyncGenerator[Piece]:
        try:
            for number in range(NUM_PIECES - 1):
                self.made[index] += 1
                yield Delta(token_ids=[number])
                await asyncio.sleep(0)
            self.made[index] += 1
            yield Ended("", tensor_pb2.FINISH_REASON_LENGTH, tensor_pb2.Usage(), tensor_pb2.StageTimes())
        finally:
            self.closed.add(index)

    async def settle(self) -> None:
        """As many turns of the loop as all pieces could need; every one of them takes its answer a step further."""
        for _ in range(20 * NUM_PIECES):
            await asyncio.sleep(0)


@pytest.mark.parametrize("num_read", [1, 2, 100])
@pytest.mark.parametrize("count", [2, 5])
async def test_who_does_not_read_is_not_worked_ahead_for(count: int, num_read: int) -> None:
    """So many pieces wait, and every answer has one more in its hand; whoever reads on gets all of them in order."""
    answers = Answers()
    read: list[Piece] = []
    async with aclosing(fan_out(count, answers.answer)) as pieces:
        while len(read) < num_read:
            read.append(await anext(pieces))
        await answers.settle()
        assert answers.num_made - num_read == MAX_UNREAD + count
        await answers.settle()
        assert answers.num_made - num_read == MAX_UNREAD + count, "and so it stays"
        async for piece in pieces:
            read.append(piece)
            assert answers.num_made - len(read) <= MAX_UNREAD + count
    for index in range(count):
        own = [piece for piece in read if piece.index == index]
        assert isinstance(own.pop(), Ended)
        assert [piece.token_ids for piece in own if isinstance(piece, Delta)] == [[n] for n in range(NUM_PIECES - 1)]


async def test_one_answer_alone_is_not_worked_ahead_for() -> None:
    answers = Answers()
    async with aclosing(fan_out(1, answers.answer)) as pieces:
        await anext(pieces)
        await answers.settle()
        assert answers.num_made == 1


async def test_who_stops_reading_for_good_leaves_nothing() -> None:
    """The answers that wait for room, and those that have not begun, end with the client."""
    before = asyncio.all_tasks()
    answers = Answers()
    async with aclosing(fan_out(3, answers.answer)) as pieces:
        await anext(pieces)
        await answers.settle()
        assert not answers.closed
    assert answers.closed == {0, 1, 2}
    assert asyncio.all_tasks() == before


def test_the_seed_after_the_largest_is_0() -> None:
    call = GenerateCall(Prompt("x"), "id", tensor_pb2.SamplingParams(seed=(1 << 64) - 1))
    assert [nth_call(call, index).sampling.seed for index in range(3)] == [(1 << 64) - 1, 0, 1]
