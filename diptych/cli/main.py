"""The `diptych` command.

Exit codes: 0 success, 1 the request or service failed, 2 unknown, missing or invalid options, 130 after Ctrl-C, which
may come while everything else is still being imported; so nothing is imported here.
"""

from __future__ import annotations

import os
import sys

EXIT_INTERRUPTED = 130
GRPC_DEFAULTS = {
    # It notes every connection that a server ends.
    "GRPC_VERBOSITY": "ERROR",
    # Whoever waits for a call's events waits for its sockets too, as in grpcio 1.76. Where an engine of threads of its
    # own does, as in 1.85, a message wakes three more of them on its way.
    "GRPC_EXPERIMENTS": "-event_engine_client,-event_engine_listener",
}
"""What is read when grpc is imported, unless somebody has set it."""


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    try:
        set_grpc_defaults()
        from diptych.cli.commands import run

        return run(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def set_grpc_defaults() -> None:
    """To be called before grpc is imported."""
    for name, value in GRPC_DEFAULTS.items():
        os.environ.setdefault(name, value)


if __name__ == "__main__":
    sys.exit(main())
