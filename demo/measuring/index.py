"""The held-out questions as `demo/held_out/index.json` lists them; reading them takes no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from demo.training.questions import Turn


@dataclass(frozen=True)
class Question:
    """One held-out question, or a chat of two, about one picture or several.

    `prompt` is the text to send as it stands; None: the turns are sent as messages for the chat template.
    """

    number: int
    type: str
    pictures: list[Path]
    turns: list[Turn]
    prompt: str | None

    @property
    def truth(self) -> list[str]:
        """The right answer of every turn."""
        return [turn.answer for turn in self.turns]


def read_index(folder: Path) -> list[Question]:
    """Read a folder's questions."""
    entries = json.loads((folder / "index.json").read_text("utf-8"))["questions"]
    return [
        Question(
            number=entry["number"],
            type=entry["type"],
            pictures=[folder / name for name in entry["pictures"]],
            turns=[Turn(entry["type"], turn["question"], turn["answer"]) for turn in entry["turns"]],
            prompt=entry.get("prompt"),
        )
        for entry in entries
    ]
