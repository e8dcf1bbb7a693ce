"""`make demo`: serve the demo model, ask it about pictures it has never seen, print and draw what it answers.

Starts `diptych serve` (both services as processes of their own, on free loopback ports), asks one held-out question
of every type (more with --questions), streams the answers, and stops the services again, also on Ctrl-C. Then it
writes one HTML page with all there is to see: pictures, tiles, answers, tokens, times.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from pathlib import Path

from demo.measuring.index import Question, read_index
from demo.show.asking import Exchange, converse
from demo.show.page import write_page
from demo.show.services import serve
from diptych.client import AsyncClient

DEMO = Path(__file__).resolve().parent
PAGE = DEMO / "output" / "report.html"


def main(argv: list[str] | None = None) -> int:
    """0 if every question was answered; 130 after Ctrl-C, SIGTERM or SIGHUP."""
    parser = _parser()
    options = parser.parse_args(argv)
    if not is_anyres(options.model):
        parser.error(f"{options.model} is no LLaVA-NeXT checkpoint: the page draws the tiles of that family")
    questions = choose(read_index(DEMO / "held_out"), options.questions)
    try:
        exchanges = asyncio.run(ask(options.model, questions))
        write_page(exchanges, options.model, options.output)
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("\nstopped")
        return 130
    print(f"\nLook at it: {options.output.resolve().as_uri()}")
    return 0


def is_anyres(model: Path) -> bool:
    """Whether a folder has the configuration of a LLaVA-NeXT."""
    config = model / "config.json"
    return config.is_file() and json.loads(config.read_text("utf-8")).get("model_type") == "llava_next"


async def ask(model: Path, questions: list[Question]) -> list[Exchange]:
    """Serve the model, ask everything, stop the services."""
    # However it is ended, the services must not outlive the demo; asyncio does nothing for Ctrl-C where a shell has
    # started it in the background.
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    async with serve(model) as address, AsyncClient(address) as client:
        exchanges = [await converse(client, question) for question in questions]
        print(f"\n{verdict(exchanges)}")
    return exchanges


def choose(questions: list[Question], number: int) -> list[Question]:
    """Return the first `number` of every type: none is picked because the model knows it."""
    by_type: dict[str, list[Question]] = {}
    for question in questions:
        by_type.setdefault(question.type, []).append(question)
    return [question for those in by_type.values() for question in those[:number]]


def verdict(exchanges: list[Exchange]) -> str:
    """Word how many were right."""
    right = sum(exchange.is_right for exchange in exchanges)
    seconds = [turn.seconds for exchange in exchanges for turn in exchange.turns]
    return f"{right} of {len(exchanges)} right, {1000 * sum(seconds) / max(len(seconds), 1):.0f} ms per answer"


def _parser() -> argparse.ArgumentParser:
    default = "(default: %(default)s)"
    parser = argparse.ArgumentParser(prog="python -m demo.run", description=__doc__)
    parser.add_argument("--questions", type=int, default=1, help=f"how many of each type to ask {default}")
    parser.add_argument("--model", type=Path, default=DEMO / "model", help="LLaVA-NeXT checkpoint to serve")
    parser.add_argument("--output", type=Path, default=PAGE, metavar="FILE", help=f"where the page goes {default}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
