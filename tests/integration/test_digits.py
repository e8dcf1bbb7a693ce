"""The demo model, served, sees what its card says."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor

from diptych.client import Chat, Client, Media, Message, Prompt
from tests.conftest import DEMO_MODEL

HELD_OUT = DEMO_MODEL.parent / "held_out"
INDEX = json.loads((HELD_OUT / "index.json").read_text("utf-8"))


def test_held_out_digits(served_demo) -> None:
    """100 pictures through both services, 8 at once; the card has the number, give or take one answer."""
    with Client(served_demo.preprocess_address) as client, ThreadPoolExecutor(8) as pool:

        def ask(entry: dict) -> str:
            prompt = Prompt(INDEX["prompt"], [Media.file(HELD_OUT / entry["file"])])
            return client.generate(prompt, temperature=0, max_tokens=8).text

        answers = list(pool.map(ask, INDEX["pictures"]))
    right = sum(answer.strip() == str(entry["digit"]) for answer, entry in zip(answers, INDEX["pictures"], strict=True))
    card = re.search(r"demo/held_out`[^|]*\| (\d+) of (\d+) \|", (DEMO_MODEL / "README.md").read_text("utf-8"))
    assert card is not None
    assert len(answers) == int(card[2]) == 100
    assert abs(right - int(card[1])) <= 1
    agreeing = sum(answer.strip() == entry["answer"] for answer, entry in zip(answers, INDEX["pictures"], strict=True))
    assert agreeing >= 99


def test_chat_about_one_picture(served_demo) -> None:
    entry = INDEX["pictures"][0]
    with Client(served_demo.preprocess_address) as client:
        message = Message("user", [Media.file(HELD_OUT / entry["file"]), INDEX["question"]])
        answer = client.generate(Chat([message]), temperature=0, max_tokens=8)
    assert answer.text.strip() == entry["answer"]
    assert answer.final.finish_reason == "stop"
