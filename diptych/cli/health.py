"""Ask whether a service serves: prints its state, exit code 0 if it is SERVING, else 1.

examples:
  diptych health --address 127.0.0.1:50051
  diptych health --address 127.0.0.1:50051 --service diptych.v1.PreprocessService
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from diptych.client.sync import Client


def add_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Declare flags."""
    parser.add_argument("--address", required=True, metavar="HOST:PORT", help="of either service")
    parser.add_argument(
        "--service",
        default="",
        metavar="NAME",
        help="diptych.v1.PreprocessService or diptych.v1.ExecutorService; without it: whether the process serves",
    )
    parser.add_argument("--timeout", type=float, default=5.0, metavar="SECONDS", help="default: 5")


def run(arguments: argparse.Namespace) -> int:
    """Ask once."""
    with Client(arguments.address, timeout=arguments.timeout) as client:
        state = client.health(arguments.service)
    print(state)
    return 0 if state == "SERVING" else 1
