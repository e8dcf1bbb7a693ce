"""Where the time of an end-to-end run goes: what every step computed, the device's time in it, and between steps.

Events go before and behind what a step enqueues. A step that waits for the host inside has a long time of its own;
one that the host was late with has a gap before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import Any

import torch

from executor_service.engine.model_runner import ModelOutput, ModelRunner
from executor_service.engine.scheduler import ScheduledBatch


@dataclass
class StepTime:
    """Prompt tokens, rows that decode, pictures encoded; milliseconds of host and device, and the gap before."""

    num_prompt_tokens: int
    num_decodes: int
    num_items: int
    host_ms: float = 0.0
    device_ms: float = 0.0
    gap_ms: float = 0.0


class StepTimes:
    """Stands in for a runner's `execute` while it is entered; `steps` are whole when it is left."""

    def __init__(self, runner: ModelRunner) -> None:
        self.steps: list[StepTime] = []
        self._runner: Any = runner
        self._execute = runner.execute
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> StepTimes:
        self._runner.execute = self._timed
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        del self._runner.execute
        torch.cuda.synchronize()
        last = None
        for step, (begin, end) in zip(self.steps, self._events, strict=True):
            step.device_ms = begin.elapsed_time(end)
            step.gap_ms = last.elapsed_time(begin) if last is not None else 0.0
            last = end

    def _timed(self, batch: ScheduledBatch) -> ModelOutput:
        prompt = sum(one.num_tokens for one in batch.requests if one.num_tokens > 1)
        num_decodes = sum(one.num_tokens == 1 for one in batch.requests)
        step = StepTime(prompt, num_decodes, sum(len(one.items) for one in batch.requests))
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began = perf_counter()
        begin.record()
        output = self._execute(batch)
        end.record()
        step.host_ms = 1000 * (perf_counter() - began)
        self.steps.append(step)
        self._events.append((begin, end))
        return output


def summary(steps: Sequence[StepTime]) -> dict[str, dict[str, float]]:
    """Sums over the steps that prefill and those that only decode."""
    groups = {
        "prefill": [step for step in steps if step.num_prompt_tokens],
        "decode": [step for step in steps if not step.num_prompt_tokens],
    }
    return {
        name: {
            "steps": len(group),
            **{field: sum(getattr(step, field) for step in group) for field in vars(group[0])},
        }
        for name, group in groups.items()
        if group
    }
