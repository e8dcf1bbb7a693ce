"""Run both services as child processes; Ctrl-C stops all.

It prints one line `listening on HOST:PORT`, the public address, when requests can be answered. The executor
listens on the loopback interface only. Every flag of `diptych preprocess` and `diptych executor` is taken; the
executor's metrics are on the port after `--metrics-port`.

examples:
  diptych serve --model ./llava-1.5-7b-hf
  diptych serve --model ./llava-1.5-7b-hf --host 0.0.0.0 --limit-mm-per-prompt image=4 --config diptych.yaml
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Final

from diptych.cli import both
from diptych.cli.both import LOOPBACK, BothSettings
from diptych.cli.children import Children, Exited, Listening, Signalled, reserved_port

DEFAULT_EXECUTOR_PORT: Final = 50052
EXIT_INTERRUPTED: Final = 130
EXIT_USAGE: Final = 2


def add_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """One flag per setting of either service, and the executor's port."""
    both.add_arguments(parser)
    parser.add_argument(
        "--executor-port",
        type=int,
        default=DEFAULT_EXECUTOR_PORT,
        metavar="PORT",
        help=f"port of the executor; 0 picks a free one (default: {DEFAULT_EXECUTOR_PORT})",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until stopped or until a child dies."""
    return run_both(BothSettings(vars(arguments)), arguments.executor_port, _announce)


def run_both(settings: BothSettings, executor_port: int, announce: Callable[[str], None]) -> int:
    """Start the executor and the preprocess service, watch them, stop them; returns the exit code."""
    children = Children(settings.preprocess.grace_period)
    with children.watching_signals(), reserved_port(executor_port, LOOPBACK) as port:
        try:
            start_both(children, settings, port)
            return _watch(children, announce)
        finally:
            children.stop()


def start_both(children: Children, settings: BothSettings, executor_port: int) -> None:
    """Start both at once: the preprocess service waits for the executor by itself."""
    children.start("executor", settings.executor_arguments(executor_port))
    children.start("preprocess", settings.preprocess_arguments(f"{LOOPBACK}:{executor_port}"))


def _watch(children: Children, announce: Callable[[str], None]) -> int:
    while True:
        event = children.events.get()
        if isinstance(event, Signalled):
            return EXIT_INTERRUPTED if event.number == signal.SIGINT else 0
        if isinstance(event, Exited):
            print(f"error: the {event.name} service ended with exit code {event.code}", file=sys.stderr)
            return EXIT_USAGE if event.code == EXIT_USAGE else 1
        if isinstance(event, Listening) and event.name == "preprocess":
            announce(event.address)


def _announce(address: str) -> None:
    print(f"listening on {address}", flush=True)
