"""A request's stages on one time line, from the times that came with its answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PREPROCESS, EXECUTOR = "preprocess", "executor"


@dataclass(frozen=True)
class Stage:
    """One stage: its service, when it began and how long it took in milliseconds, and both as shares of the line."""

    name: str
    service: str
    start: float
    milliseconds: float
    left: float
    width: float


def stages(times: Mapping[str, float]) -> list[Stage]:
    """Lay the stages out.

    The response has lengths alone. Plan, transfer, queue, prefill and generate follow one another; decoding and mapping
    happen during the transfer and are sums over all pictures, which threads share, so they may reach beyond it.
    """
    ms = {name: 1000 * seconds for name, seconds in times.items()}
    plan, decode = ms.get("plan", 0.0), ms.get("decode_media", 0.0)
    received = plan + ms.get("transfer", 0.0)
    scheduled = received + ms.get("queue", 0.0)
    first_token = scheduled + ms.get("prefill", 0.0)
    rows = [
        ("plan", PREPROCESS, "plan", 0.0),
        ("decode", PREPROCESS, "decode_media", plan),
        ("map", PREPROCESS, "map", plan + decode),
        ("transfer", EXECUTOR, "transfer", plan),
        ("queue", EXECUTOR, "queue", received),
        ("prefill", EXECUTOR, "prefill", scheduled),
        ("generate", EXECUTOR, "generate", first_token),
    ]
    present = [(name, service, start, ms[key]) for name, service, key, start in rows if key in ms]
    end = max((start + length for _, _, start, length in present), default=0.0) or 1.0
    return [
        Stage(name, service, start, length, 100 * start / end, 100 * length / end)
        for name, service, start, length in present
    ]
