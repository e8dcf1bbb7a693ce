"""The `diptych` command.

Exit codes: 0 success, 1 the request or service failed, 2 unknown, missing or invalid options, 130 after Ctrl-C, which
may come while everything else is still being imported; so nothing is imported here.
"""

from __future__ import annotations

import os
import sys

EXIT_INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    try:
        # grpc notes every connection that a server ends; read when it is imported.
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
        from diptych.cli.commands import run

        return run(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
