"""The demo model, served, sees what its card says: two hundred held-out questions through both services."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from demo.measuring.index import Question, read_index
from demo.show.asking import MAX_TOKENS, wording
from diptych.client import Client
from tests.conftest import DEMO_MODEL

QUESTIONS = read_index(DEMO_MODEL.parent / "held_out")
REFERENCE = json.loads((DEMO_MODEL / "held_out_answers.json").read_text("utf-8"))
AT_ONCE = 16


def ask(client: Client, question: Question) -> list[str]:
    """Every turn, each after the right answers to the earlier ones, as the reference was asked."""
    prompts = [wording(question, question.truth[:number], number) for number in range(len(question.turns))]
    return [client.generate(prompt, temperature=0, max_tokens=MAX_TOKENS).text for prompt in prompts]


@pytest.fixture(scope="module")
def said(served_demo) -> list[list[str]]:
    with Client(served_demo.preprocess_address) as client, ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda question: ask(client, question), QUESTIONS))


def test_as_many_are_right_as_the_card_says(said) -> None:
    """Give or take one answer: float32 sums in another order."""
    card = (DEMO_MODEL / "README.md").read_text("utf-8")
    (counted,) = re.findall(r"pixels: \*\*(\d+) of (\d+)\*\*", card)
    right = sum(answers == question.truth for answers, question in zip(said, QUESTIONS, strict=True))
    assert len(said) == int(counted[1]) == 200
    assert abs(right - int(counted[0])) <= 1


def test_the_card_counts_every_type() -> None:
    """Its table is that of the answers that transformers gave."""
    card = (DEMO_MODEL / "README.md").read_text("utf-8")
    for name, (right, asked) in REFERENCE["types"].items():
        those = [question for question in QUESTIONS if question.type == name]
        answers = [REFERENCE["said"][question.number] for question in those]
        assert sum(a == question.truth for a, question in zip(answers, those, strict=True)) == right
        assert len(those) == asked
        assert f"| {name} | {right} of {asked} |" in card


def test_nearly_all_answers_equal_transformers(said) -> None:
    agreeing = sum(answers == reference for answers, reference in zip(said, REFERENCE["said"], strict=True))
    assert agreeing >= 198
