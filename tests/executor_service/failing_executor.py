"""`diptych executor` with a module of these tests for an engine: MODULE [OPTION…]."""

from __future__ import annotations

import argparse
import sys
from functools import partial

from diptych.cli.services import run_with_settings
from diptych.service.settings import add_arguments
from executor_service.settings import ExecutorSettings


def main(engine_module: str, argv: list[str]) -> int:
    """Serve until the engine has died."""
    from executor_service.server import ExecutorServer

    parser = argparse.ArgumentParser()
    add_arguments(parser, ExecutorSettings)
    make = partial(ExecutorServer, engine_module=engine_module)
    return run_with_settings(parser.parse_args(argv), ExecutorSettings, lambda: make)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
