"""`make bench`: every benchmark that needs no GPU, one after the other."""

from __future__ import annotations

import sys

from benchmarks import host, served, shared_stream, split, telemetry, token_stream

BENCHMARKS = (host, token_stream, shared_stream, telemetry, split, served)


def main(argv: list[str]) -> int:
    """Run all of them with the same flags; only those that every benchmark has."""
    for benchmark in BENCHMARKS:
        print(f"\n=== {benchmark.__name__.removeprefix('benchmarks.')}", flush=True)
        benchmark.main(argv)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
