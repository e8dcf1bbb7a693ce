"""Run the preprocess service: media, chat templates and tokens on CPUs; needs no torch.

It prints one line `listening on HOST:PORT` when it is SERVING, that is, when a compatible executor is found.

examples:
  diptych preprocess --model ./llava-1.5-7b-hf --executor 127.0.0.1:50052
  DIPTYCH_EXECUTOR=gpu1:50052,gpu2:50052 diptych preprocess --model ./llava-1.5-7b-hf --host 0.0.0.0
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from diptych.cli.services import run_with_settings
from diptych.service import settings as service_settings
from diptych.service.lifecycle import Service
from preprocess_service.settings import PreprocessSettings


def add_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """One flag per setting."""
    service_settings.add_arguments(parser, PreprocessSettings)


def run(arguments: argparse.Namespace) -> int:
    """Serve until stopped."""
    return run_with_settings(arguments, PreprocessSettings, _server_class)


def _server_class() -> Callable[[PreprocessSettings], Service]:
    from preprocess_service.server import PreprocessServer

    return PreprocessServer
