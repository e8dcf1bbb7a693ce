"""Ask whether a service can do its work: prints its state, exit code 0 if it is SERVING, else 1.

A preprocess service is SERVING while a compatible executor is ready, an executor from the end of its boot on; neither
is any more once it stops. With --service "" the question is whether the process listens, whatever it can do by itself.

examples:
  diptych health --address 127.0.0.1:50051
  diptych health --address 127.0.0.1:50051 --service diptych.v1.PreprocessService
  diptych health --address 127.0.0.1:50051 --service ""
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Final

from diptych.cli.peer import EXECUTOR, PREPROCESS, find_service
from diptych.client.errors import RequestError
from diptych.client.sync import Client

SERVING: Final = "SERVING"
REASONS: Final = {
    PREPROCESS: "no compatible executor is ready (its log says why), or it is stopping",
    EXECUTOR: "it is still booting, or it is stopping",
}


def add_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Declare flags."""
    parser.add_argument("--address", required=True, metavar="HOST:PORT", help="of either service")
    parser.add_argument(
        "--service",
        metavar="NAME",
        help=f'default: {PREPROCESS} or {EXECUTOR}, whichever is there; "": whether the process listens',
    )
    parser.add_argument("--timeout", type=float, default=5.0, metavar="SECONDS", help="default: 5")


def run(arguments: argparse.Namespace) -> int:
    """Ask once."""
    with Client(arguments.address, timeout=arguments.timeout) as client:
        name = arguments.service
        name, state = _find(client, arguments.address) if name is None else (name, client.health(name))
    print(state)
    if state != SERVING and name in REASONS:
        print(f"{name} on {arguments.address}: {REASONS[name]}", file=sys.stderr)
    return 0 if state == SERVING else 1


def _find(client: Client, address: str) -> tuple[str, str]:
    try:
        found = find_service(client)
    except RequestError as error:
        if error.code != "UNIMPLEMENTED":
            raise
        message = f"what listens on {address} is no service of Diptych and has no gRPC health ({error.message})"
        raise RequestError(error.code, message, {"address": address}) from None
    if found is None:
        message = f'what listens on {address} is neither {PREPROCESS} nor {EXECUTOR}; --service "" asks for the process'
        raise RequestError("NOT_FOUND", message, {"address": address})
    return found
