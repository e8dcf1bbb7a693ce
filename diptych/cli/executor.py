"""Run the executor service: the model, its memory and its batches.

It prints one line `listening on HOST:PORT` when it is SERVING, that is, when the model is loaded and profiled.

examples:
  diptych executor --model ./llava-1.5-7b-hf
  diptych executor --model ./llava-1.5-7b-hf --device cpu --max-model-len 2048 --limit-mm-per-prompt image=4
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

from diptych.cli.services import run_with_settings
from diptych.service import settings as service_settings
from diptych.service.beginning import process_began
from diptych.service.lifecycle import Service
from executor_service.settings import ExecutorSettings


def add_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """One flag per setting."""
    service_settings.add_arguments(parser, ExecutorSettings)


def run(arguments: argparse.Namespace) -> int:
    """Serve until stopped."""
    return run_with_settings(arguments, ExecutorSettings, _server_class)


def _server_class() -> Callable[[ExecutorSettings], Service]:
    from executor_service.server import ExecutorServer

    return partial(ExecutorServer, began=process_began())
