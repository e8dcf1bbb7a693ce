"""A prompt's tokens in order: runs of text, and between them each picture's placeholder range."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from diptych.client import Plan


@dataclass(frozen=True)
class Segment:
    """Tokens `start` to `start + count - 1`: picture number `picture` (from 1), or text, token by token."""

    start: int
    count: int
    picture: int | None = None
    tokens: list[str] = field(default_factory=list)

    @property
    def end(self) -> int:
        """The last token's index."""
        return self.start + self.count - 1


def segments(plan: Plan, tokenizer: Any) -> list[Segment]:
    """Cut a plan's prompt into its runs."""
    found: list[Segment] = []
    position = 0
    for number, item in enumerate(plan.items, 1):
        found += _text(plan, position, item.offset, tokenizer)
        found.append(Segment(item.offset, item.length, picture=number))
        position = item.offset + item.length
    return [*found, *_text(plan, position, len(plan.prompt_token_ids), tokenizer)]


def _text(plan: Plan, start: int, end: int, tokenizer: Any) -> list[Segment]:
    if start == end:
        return []
    tokens = [_visible(tokenizer.decode([token])) for token in plan.prompt_token_ids[start:end]]
    return [Segment(start, end - start, tokens=tokens)]


def _visible(text: str) -> str:
    """Spaces and line breaks as signs, so that every token can be seen."""
    return text.replace(" ", "␣").replace("\n", "↵")
