"""An engine process on a CPU that fails as its environment says: in its boot, in a model's load, or in a step."""

from __future__ import annotations

import itertools
import os
import sys
import time
from typing import Any, Final

import torch

from executor_service.engine import boot, process
from executor_service.engine.model_runner import ModelRunner
from executor_service.models import weights
from executor_service.models.llava import LlavaModel
from executor_service.models.weights import WeightReader
from registry.errors import CheckpointError

FAILURE: Final = "FAILING_ENGINE_FAILURE"
"""The environment variable: one of FAILURES."""
FAILING_STEP: Final = 10
"""Of those with two requests."""
REASON: Final = "nobody has thought of this"
BOOT: Final[Any] = boot
RUNNER: Final[Any] = ModelRunner
MODEL: Final[Any] = LlavaModel
WEIGHTS: Final[Any] = weights
"""What is changed here, for this process alone."""


def reader_whose_threads_wait(config: Any) -> WeightReader:
    """As a GPU's, which has begun with the weights before the boot: it has no room for more than one that is taken."""
    WEIGHTS.CPU_AHEAD_BYTES, WEIGHTS.NUM_READERS = 0, {"cpu": 8}
    reader = WeightReader(config.model_dir, torch.device("cpu"))
    while not reader._turns._num_waiting_bytes:
        time.sleep(0.01)
    return reader


def fail_in_boot(error: Exception) -> None:
    """Before anybody has taken a weight."""

    def raising(config: Any, *_: Any) -> Any:
        reader_whose_threads_wait(config)
        raise error

    BOOT.boot = raising


def fail_in_load() -> None:
    """In the model's own code, which may raise anything."""
    original = BOOT.boot

    def boot_with_reader(config: Any, report: Any, since: Any, reader: Any) -> Any:
        assert reader is None
        return original(config, report, since, reader_whose_threads_wait(config))

    def make(self: LlavaModel, ctx: Any) -> None:
        raise KeyError(REASON)

    BOOT.boot, MODEL.__init__ = boot_with_reader, make


def fail_in_step() -> None:
    """While two requests run."""
    original, execute, steps = BOOT.boot, RUNNER.execute, itertools.count(1)

    def failing(runner: ModelRunner, batch: Any) -> Any:
        if len(batch.requests) == 2 and next(steps) == FAILING_STEP:
            raise FloatingPointError(f"{REASON}\nand this is for the log alone")
        return execute(runner, batch)

    def boot_then_change(*arguments: Any) -> Any:
        booted = original(*arguments)
        RUNNER.execute = failing
        return booted

    BOOT.boot = boot_then_change


FAILURES: Final = {
    "boot": lambda: fail_in_boot(ValueError(REASON)),
    "checkpoint": lambda: fail_in_boot(CheckpointError(REASON)),
    "load": fail_in_load,
    "step": fail_in_step,
}


if __name__ == "__main__":
    FAILURES[os.environ[FAILURE]]()
    sys.exit(process.main(sys.argv[1:]))
