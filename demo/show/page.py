"""The page that `make demo` writes: one HTML file that needs nothing else. `page.html.jinja` says how it looks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from tqdm import tqdm

from demo.show.asking import Answered, Exchange
from demo.show.stages import Stage, stages
from demo.show.strip import Segment, segments
from demo.show.tiles import Seen, look
from registry import MediaLimits
from registry.families import open_family
from registry.family import ModelFamily

HERE = Path(__file__).resolve().parent
ACCURACY = "accuracy.json"


@dataclass(frozen=True)
class ShownTurn:
    """A turn, where its tokens stand, and its stages."""

    answered: Answered
    segments: list[Segment]
    stages: list[Stage]


@dataclass(frozen=True)
class ShownExchange:
    """A question, what the model saw of each picture, and its turns."""

    exchange: Exchange
    pictures: list[Seen]
    turns: list[ShownTurn]
    measured: tuple[int, int] | None
    """Right and asked, of this type, as the model card has them."""


def write_page(exchanges: Sequence[Exchange], model: Path, path: Path) -> None:
    """Map the pictures once more, to show their tiles, and write the page."""
    family = open_family(model, MediaLimits({"image": 4}))
    measured = _measured(model)
    bar = tqdm(exchanges, desc="drawing the page", unit=" questions", leave=False, dynamic_ncols=True)
    shown = [show(family, exchange, measured) for exchange in bar]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(shown, model.name), "utf-8")


def show(family: ModelFamily, exchange: Exchange, measured: dict[str, tuple[int, int]]) -> ShownExchange:
    """Everything there is to see of one exchange."""
    turns = [_show_turn(family, turn) for turn in exchange.turns]
    pictures = [look(family, path) for path in exchange.question.pictures]
    return ShownExchange(exchange, pictures, turns, measured.get(exchange.question.type))


def render(shown: Sequence[ShownExchange], model_name: str) -> str:
    """The page's HTML."""
    loader = FileSystemLoader(HERE)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["ms"] = milliseconds
    template = environment.get_template("page.html.jinja")
    style = (HERE / "page.css").read_text("utf-8")
    return template.render(shown=shown, model_name=model_name, style=style)


def milliseconds(value: float) -> str:
    """Word a duration: one decimal where it is short."""
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _show_turn(family: ModelFamily, turn: Answered) -> ShownTurn:
    times = turn.generation.final.times if turn.generation.final else {}
    return ShownTurn(turn, segments(turn.plan, family.ctx.tokenizer), stages(times))


def _measured(model: Path) -> dict[str, tuple[int, int]]:
    """The model card's first column, if the checkpoint has one."""
    path = model / ACCURACY
    if not path.is_file():
        return {}
    columns: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return {name: (right, asked) for name, (right, asked) in next(iter(columns.values())).items()}
