"""The executor service with `benchmarks.stand_in_engine` for an engine; takes the flags of `diptych executor`."""

from __future__ import annotations

import argparse
import sys
from functools import partial

from diptych.cli.main import set_grpc_defaults


def main(argv: list[str]) -> int:
    """Serve until stopped."""
    set_grpc_defaults()
    from diptych.cli.services import run_with_settings
    from diptych.service.settings import add_arguments
    from executor_service.server import ExecutorServer
    from executor_service.settings import ExecutorSettings

    parser = argparse.ArgumentParser(prog="python -m benchmarks.stand_in_executor", description=__doc__)
    add_arguments(parser, ExecutorSettings)
    make = partial(ExecutorServer, engine_module="benchmarks.stand_in_engine")
    return run_with_settings(parser.parse_args(argv), ExecutorSettings, lambda: make)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
