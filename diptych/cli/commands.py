"""The subcommands: picks one and turns what it raises into messages and exit codes.

Subcommands are imported when they are used, so that `diptych health` starts fast.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Final, Protocol

from diptych import __version__

COMMANDS: Final = {
    "serve": "run both services with one command",
    "preprocess": "run the preprocess service (CPU: media, chat templates, tokens)",
    "executor": "run the executor service (the model)",
    "generate": "ask for an answer to a prompt with pictures",
    "plan": "show token ids and tensor shapes of a prompt; nothing is decoded",
    "models": "list the models of a preprocess service",
    "check": "check a model family on a checkpoint: hooks, layout, mapper, model, transformers",
    "health": "ask whether a service serves; the probe for containers",
}
_EXAMPLES: Final = """\
examples:
  diptych serve --model ./llava-1.5-7b-hf
  diptych generate --address 127.0.0.1:50051 --prompt '<image> What is this?' --image cat.jpg
  diptych plan --model ./llava-1.5-7b-hf --prompt '<image> Hi' --image cat.jpg --json

`diptych COMMAND --help` explains one command.
"""
EXIT_USAGE: Final = 2


class Command(Protocol):
    """What each module of a subcommand has."""

    def add_arguments(self, parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
        """Declare flags; `arguments` is the command line, for flags that depend on others."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Do it; returns the exit code."""


def run(command_line: list[str]) -> int:
    """Run one subcommand; returns the exit code."""
    _find_modules_here()
    try:
        return _run(command_line)
    except BrokenPipeError:
        # Whoever read our output has gone; without this the interpreter complains at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _find_modules_here() -> None:
    """A plugin may be a file beside whoever tries it, as with `python -m`; what is installed still comes first."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)


def _run(command_line: list[str]) -> int:
    from diptych.cli.output import print_error
    from diptych.client.errors import RequestError

    name = command_line[0] if command_line else ""
    if name not in COMMANDS:
        return _top_level(command_line)
    command: Command = importlib.import_module(f"diptych.cli.{name}")
    parser = argparse.ArgumentParser(
        prog=f"diptych {name}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser, command_line[1:])
    try:
        return command.run(parser.parse_args(command_line[1:]))
    except RequestError as error:
        print_error(error.code, error.message, error.details)
        return 1
    except UsageError as error:
        parser.print_usage(sys.stderr)
        print(f"diptych {name}: error: {error}", file=sys.stderr)
        return EXIT_USAGE


def _top_level(command_line: list[str]) -> int:
    """`diptych`, `diptych --help`, `diptych --version`, or a command that does not exist (exit code 2)."""
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="diptych",
        usage="diptych COMMAND [options]",
        description=f"Serves vision-language models as two gRPC services.\n\ncommands:\n{listing}",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"diptych {__version__}")
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND", help=argparse.SUPPRESS)
    parser.parse_args(command_line)
    raise AssertionError("every known command is handled before")


class UsageError(Exception):
    """Options that contradict each other or do not validate: exit code 2."""
