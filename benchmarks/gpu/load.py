"""What both arms of a comparison are asked: sizes, counts, rates of arrival; and how times are told. Needs no torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Final

TEXT_TOKENS: Final = 64
OUTPUT_TOKENS: Final = 128
SIDES: Final = {"llava-1.5-7b": 336, "llava-next-mistral-7b": 672, "tiny-llava": 336, "tiny-llava-next": 672}
"""Side of the square pictures that each geometry is asked about."""
MAX_MODEL_LEN: Final = {"llava-1.5-7b": 1024, "tiny-llava": 1024}
OTHER_MAX_MODEL_LEN: Final = 3328
MAX_NUM_SEQS: Final = 256
BATCHES: Final = (1, 16, 64, 128, 256)
PREFILLS: Final = {"llava-1.5-7b": 256, "llava-next-mistral-7b": 64}
"""Requests with one output token."""
MIXED: Final = {"llava-1.5-7b": (128, 16.0), "llava-next-mistral-7b": (48, 4.0)}
"""Requests, and how many of them arrive in a second."""


def max_model_len(geometry: str) -> int:
    """Of the workload's requests, rounded up."""
    return MAX_MODEL_LEN.get(geometry, OTHER_MAX_MODEL_LEN)


def milliseconds(values: Sequence[float]) -> dict[str, float]:
    """Median, and bounds of the slowest tenth and hundredth, of seconds."""
    if not values:
        return {}
    ordered = sorted(1000 * value for value in values)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered), "p90": ordered[round(0.9 * last)], "p99": ordered[round(0.99 * last)],
        "max": ordered[-1], "count": len(ordered),
    }  # fmt: skip
