"""An engine process whose GPU fails for good in its tenth step: a device-side assertion, after which nothing runs."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch

from executor_service.engine import boot as booting
from executor_service.engine import process
from executor_service.engine.model_runner import ModelRunner

FAILING_STEP = 10


def main(argv: list[str]) -> int:
    """As the real one, but for that."""
    execute, steps = ModelRunner.execute, itertools.count(1)

    def failing(runner: ModelRunner, batch: Any) -> Any:
        if next(steps) == FAILING_STEP:
            torch.zeros(1, device="cuda")[torch.tensor([1 << 20], device="cuda")]
        return execute(runner, batch)

    def boot(*arguments: Any) -> Any:
        booted = original(*arguments)
        ModelRunner.execute = failing  # type: ignore[method-assign]
        return booted

    original, booting.boot = booting.boot, boot
    return process.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
