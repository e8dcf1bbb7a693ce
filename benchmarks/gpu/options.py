"""Command lines of benchmarks for a GPU: without one they say what is missing, before a recorded result is lost."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tools.require_gpu import missing


def parse_for_gpu(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; exit 1 with what is missing for a GPU, unless `--device` names something else."""
    options = parser.parse_args(argv)
    if getattr(options, "device", "cuda") == "cuda" and (found := missing()):
        parser.exit(1, "this benchmark needs a GPU, and this is missing:\n- " + "\n- ".join(found) + "\n")
    return options
