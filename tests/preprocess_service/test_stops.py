"""Answers that end at a stop string: what of them is told, and that the executor stops at once."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from diptych.client import AsyncClient, Prompt
from diptych.v1 import executor_pb2, tensor_pb2
from preprocess_service import pipeline, requests
from preprocess_service.answer import Answer
from preprocess_service.executor_client import Completed, TokenOutput
from preprocess_service.executor_client.request import Event
from preprocess_service.planning import Checkpoint
from preprocess_service.requests import Delta, Ended, GenerateCall
from preprocess_service.sending import ItemSender
from preprocess_service.server import PreprocessServer
from tests.preprocess_service.serving import words
from tests.stand_in_executor import StandInExecutor, eventually


def talks_on(executor: StandInExecutor, checkpoint: Checkpoint) -> None:
    """Its answer has the stop string soon, and does not end for long."""
    executor.delay = 0.01
    executor.script = lambda start: words(checkpoint, "one STOP") + words(checkpoint, " more") * 10_000


async def test_a_stop_string_ends_the_work(
    client: AsyncClient, executor: StandInExecutor, checkpoint: Checkpoint
) -> None:
    executor.delay = 0.002
    executor.script = lambda start: words(checkpoint, "one two STOP three") + words(checkpoint, " more") * 200
    answer = await client.generate(Prompt("count"), stop=["STOP", "never"])
    assert answer.text == "one two "
    assert answer.final is not None
    assert (answer.final.finish_reason, answer.final.stop) == ("stop", "STOP")
    assert answer.final.usage.completion_tokens == len(answer.token_ids)
    assert checkpoint.tokenizer.decode(answer.token_ids).rstrip() in ("one two STOP", "one two STOP t")
    assert "three" not in checkpoint.tokenizer.decode(answer.token_ids)
    request = executor.requests[-1]
    assert (request.stopped.is_set(), request.cancelled.is_set()) == (True, False)
    assert answer.final.usage.cached_tokens == 1
    assert answer.final.times["prefill"] == 0.25
    assert answer.final.times["plan"] > 0


async def test_an_executor_that_does_not_mind_a_stop_is_not_waited_for(
    client: AsyncClient, executor: StandInExecutor, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "STOP_PATIENCE", 0.05)
    executor.minds_stops = False
    talks_on(executor, checkpoint)
    answer = await client.generate(Prompt("count"), stop=["STOP"])
    assert (answer.text, answer.final and answer.final.stop) == ("one ", "STOP")
    assert answer.final is not None
    assert answer.final.usage.prompt_tokens == len(executor.requests[-1].start.prompt_token_ids)
    assert answer.final.usage.completion_tokens == len(answer.token_ids)
    await eventually(executor.requests[-1].cancelled.is_set)


async def test_a_stop_goes_out_before_anybody_takes_the_text(
    server: PreprocessServer, executor: StandInExecutor, checkpoint: Checkpoint
) -> None:
    """Who does not read keeps no executor busy."""
    talks_on(executor, checkpoint)
    assert server._pipeline is not None
    sampling = tensor_pb2.SamplingParams(max_tokens=5000)
    call = GenerateCall(requests.Prompt("count"), "slow", sampling, ("STOP",))
    async with aclosing(server._pipeline.generate(call)) as pieces:
        text = ""
        while "one" not in text:
            piece = await anext(pieces)
            assert isinstance(piece, Delta)
            text += piece.text
        while not executor.requests[-1].stopped.is_set():
            piece = await asyncio.wait_for(anext(pieces), 20)
            assert isinstance(piece, Delta)
            await asyncio.sleep(0.05)
        assert isinstance(await anext(pieces), Ended)


async def test_a_stopped_answer_does_not_wait_for_its_deadline(
    client: AsyncClient, executor: StandInExecutor, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "STOP_PATIENCE", 1000.0)
    executor.minds_stops = False
    talks_on(executor, checkpoint)
    answer = await client.generate(Prompt("count"), stop=["STOP"], timeout=4)
    assert (answer.text, answer.final and answer.final.stop) == ("one ", "STOP")


class AtOnce:
    """A request whose tokens and end arrive together."""

    def __init__(self, token_ids: list[int]) -> None:
        self._events = [TokenOutput(token_id, None) for token_id in token_ids]
        usage = tensor_pb2.Usage(prompt_tokens=3, completion_tokens=len(token_ids), cached_tokens=2)
        self._end = Completed(executor_pb2.Completion(finish_reason=tensor_pb2.FINISH_REASON_LENGTH, usage=usage))

    async def next_events(self) -> list[Event]:
        return [*self._events, self._end]

    def fail_after(self, seconds: float | None, make_error: object) -> None:
        return None


async def test_an_answer_that_stops_when_all_of_it_has_come(server: PreprocessServer, checkpoint: Checkpoint) -> None:
    """What follows the stop string is not there, nor is another one."""
    assert server._pipeline is not None
    plan = server._pipeline._planner.plan(requests.Prompt("count"))
    call = GenerateCall(requests.Prompt("count"), "at once", stop=("STOP",))
    remote: Any = AtOnce(words(checkpoint, "one STOP two STOP three"))
    answer, sender = Answer(checkpoint.tokenizer, call.stop, plan), ItemSender(plan, None, None, None)  # type: ignore[arg-type]
    delta, ended = [piece async for piece in server._pipeline._answer(call, answer, sender, remote)]
    assert isinstance(delta, Delta)
    assert isinstance(ended, Ended)
    assert (delta.text + ended.text, ended.stop) == ("one ", "STOP")
    assert ended.finish_reason == tensor_pb2.FINISH_REASON_STOP
    assert (ended.usage.completion_tokens, ended.usage.cached_tokens) == (len(delta.token_ids), 2)
    assert "two" not in checkpoint.tokenizer.decode(delta.token_ids)


async def test_text_held_back_for_a_stop_string_comes_at_the_end(
    client: AsyncClient, executor: StandInExecutor, checkpoint: Checkpoint
) -> None:
    executor.script = lambda start: words(checkpoint, "almost STO")
    answer = await client.generate(Prompt("x"), stop=["STOP"])
    assert answer.text == "almost STO"
    assert answer.final is not None
    assert answer.final.stop is None
