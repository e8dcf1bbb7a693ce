"""Held-out questions put to the served model: the answer printed as it comes, and everything known about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from demo.measuring.index import Question
from diptych.client import AsyncClient, Chat, Generation, Media, Message, Plan, Prompt

MAX_TOKENS = 64
DEADLINE_SECONDS = 60
CONTINUED = " " * 2


@dataclass(frozen=True)
class Answered:
    """One turn: what was asked, what came back, what would have been right, and how it went.

    Seconds are the client's: to the first piece of text, and to the end.
    """

    question: str
    truth: str
    plan: Plan
    generation: Generation
    first_seconds: float
    seconds: float

    @property
    def answer(self) -> str:
        """The whole answer."""
        return self.generation.text

    @property
    def is_right(self) -> bool:
        """Whether the whole text is right."""
        return self.answer == self.truth


@dataclass(frozen=True)
class Exchange:
    """A held-out question, or a chat of two, with what the model said."""

    question: Question
    turns: list[Answered]

    @property
    def is_right(self) -> bool:
        """Whether every turn was answered rightly."""
        return all(turn.is_right for turn in self.turns)


async def converse(client: AsyncClient, question: Question) -> Exchange:
    """Ask every turn, printing as it goes; a second question follows the model's own first answer."""
    print(f"\n{question.type} · {', '.join(path.name for path in question.pictures)}")
    turns: list[Answered] = []
    for number, turn in enumerate(question.turns):
        prompt = wording(question, [answered.answer for answered in turns], number)
        print(f"{CONTINUED}{turn.question}", flush=True)
        turns.append(await _answer(client, prompt, turn.question, turn.answer))
    return Exchange(question, turns)


def wording(question: Question, answers: Sequence[str], number: int) -> Prompt | Chat:
    """Turn `number` of a question as a client sends it, after these answers to the turns before it."""
    pictures = [Media.file(path) for path in question.pictures]
    if question.prompt is not None:
        return Prompt(question.prompt, pictures)
    messages = [Message("user", [*pictures, question.turns[0].question])]
    for answer, turn in zip(answers, question.turns[1 : number + 1], strict=True):
        messages += [Message("assistant", [answer]), Message("user", [turn.question])]
    return Chat(messages)


async def _answer(client: AsyncClient, prompt: Prompt | Chat, question: str, truth: str) -> Answered:
    plan = await client.plan(prompt)
    print(f"{CONTINUED}→ ", end="", flush=True)
    generation, first, seconds = await _stream(client, prompt, lambda text: print(text, end="", flush=True))
    answered = Answered(question, truth, plan, generation, first, seconds)
    verdict = "right" if answered.is_right else f"wrong: {truth}"
    print(f"   [{verdict}; {1000 * seconds:.0f} ms]", flush=True)
    return answered


async def _stream(
    client: AsyncClient, prompt: Prompt | Chat, show: Callable[[str], object]
) -> tuple[Generation, float, float]:
    """The answer, and the seconds to its first text and to its end."""
    generation, first, start = Generation(), 0.0, time.perf_counter()
    async for piece in client.stream(prompt, timeout=DEADLINE_SECONDS, temperature=0, max_tokens=MAX_TOKENS):
        generation.add(piece)
        show(piece.text)
        first = first or (time.perf_counter() - start if piece.text else 0.0)
    return generation, first, time.perf_counter() - start
