"""Several answers to one request, side by side.

The first runs alone until its first token: by then the prompt's keys and values are in the executor's prefix cache
and its media items are there, so that the others begin where it stands.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Final

from diptych.v1 import tensor_pb2
from preprocess_service.requests import Delta, Ended, GenerateCall

MAX_UNREAD: Final = 64
"""Pieces that wait for the client; answers that are ahead wait then."""

Piece = Delta | Ended


def nth_call(call: GenerateCall, index: int) -> GenerateCall:
    """The call for answer `index`: its seed is `seed` + index, and the prompt is scored with the first alone."""
    if not index:
        return call
    sampling = tensor_pb2.SamplingParams()
    sampling.CopyFrom(call.sampling)
    sampling.ClearField("prompt_logprobs")
    if sampling.HasField("seed"):
        sampling.seed = (sampling.seed + index) % (1 << 64)
    return replace(call, sampling=sampling)


def fan_out(count: int, answer: Callable[[int], AsyncGenerator[Piece]]) -> AsyncGenerator[Piece]:
    """Pieces of answers 0 to `count` - 1 as they come; the first failure ends them all."""
    return answer(0) if count == 1 else _side_by_side(count, answer)


async def _side_by_side(count: int, answer: Callable[[int], AsyncGenerator[Piece]]) -> AsyncGenerator[Piece]:
    pieces: asyncio.Queue[Piece | asyncio.Task[None]] = asyncio.Queue(MAX_UNREAD)
    has_begun = asyncio.Event()

    async def run(index: int) -> None:
        if index:
            await has_begun.wait()
        async with aclosing(answer(index)) as own:
            async for piece in own:
                piece.index = index
                await pieces.put(piece)
                if isinstance(piece, Ended) or piece.token_ids:
                    has_begun.set()

    async def report(index: int) -> None:
        task = tasks[index]
        await asyncio.wait((task,))
        await pieces.put(task)

    tasks = [asyncio.create_task(run(index)) for index in range(count)]
    reports = [asyncio.create_task(report(index)) for index in range(count)]
    num_running = count
    try:
        while num_running:
            piece = await pieces.get()
            if isinstance(piece, asyncio.Task):
                piece.result()
                num_running -= 1
            else:
                yield piece
    finally:
        for task in (*tasks, *reports):
            task.cancel()
        await asyncio.gather(*tasks, *reports, return_exceptions=True)
