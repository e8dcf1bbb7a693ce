"""Runs the engine with a model whose forward is free, and prints as JSON where each step's time goes.

A script of its own, `python benchmarks/host_steps.py NUM_STEPS PROFILED NUM_REQUESTS…`, that imports the engine
and nothing else: `benchmarks.host` runs it on one checkout or on two in turn, each from its own PYTHONPATH.
"""

from __future__ import annotations

import cProfile
import hashlib
import json
import pickle
import pstats
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from executor_service.engine.block_manager import BlockManager
from executor_service.engine.core import Engine
from executor_service.engine.encoder_cache import EncoderCache
from executor_service.engine.limits import EngineLimits
from executor_service.engine.messages import SamplingParams
from executor_service.engine.model_runner import ModelRunner
from executor_service.engine.request import EngineItem, Request
from executor_service.engine.scheduler import Scheduler
from registry import ItemLayout, PlaceholderRange, Run, TensorSpec

BLOCK_SIZE = 16
PROMPT_TOKENS = 256
PICTURE_TOKENS = 64
WARM_UP = 20
BOOKKEEPING = ("schedule", "update", "report")


class FreeModel(nn.Module):
    """The model protocol at no cost: hidden states are the embeddings, of one element; logits always the same."""

    def __init__(self, max_rows: int) -> None:
        super().__init__()
        self._embedding = nn.Embedding(8, 1)
        self._logits = torch.randn((max_rows, 8), generator=torch.Generator().manual_seed(0))

    def get_input_embeddings(self) -> nn.Module:
        """Of one element a token."""
        return self._embedding

    def embed_multimodal(self, pixel_values: list[Tensor]) -> list[Tensor]:
        """Zeros."""
        return [torch.zeros((PICTURE_TOKENS, 1)) for _ in pixel_values]

    def forward(self, input_ids: Tensor, positions: Tensor, inputs_embeds: Tensor) -> Tensor:
        """Nothing."""
        return inputs_embeds

    def compute_logits(self, rows: Tensor) -> Tensor:
        """Always the same."""
        return self._logits[: len(rows)]


class Stopwatch:
    """Seconds by stage of the step that runs."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def watch(self, owner: object, method: str, stage: str) -> None:
        """Count the time in a method as a stage."""
        setattr(owner, method, self.timed(getattr(owner, method), stage))

    def timed(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        """The function, with its time counted."""

        def call(*arguments: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                self.seconds[stage] += time.perf_counter() - start

        return call


def make_engine(num_requests: int, num_steps: int) -> Engine:
    """An engine with as many running requests, each with a picture in its prompt, all of them decoding."""
    length = PROMPT_TOKENS + num_steps + WARM_UP + 2
    budget = 2 * num_requests * PROMPT_TOKENS
    limits = EngineLimits(budget, num_requests, num_requests * PICTURE_TOKENS, length + PROMPT_TOKENS, BLOCK_SIZE)
    runner = ModelRunner(FreeModel(num_requests), torch.device("cpu"), torch.float32, limits)
    blocks = BlockManager(num_requests * (length // BLOCK_SIZE + 4), BLOCK_SIZE)
    cache = EncoderCache(num_requests * PICTURE_TOKENS)
    scheduler = Scheduler(blocks, cache, num_requests, budget, num_requests * PICTURE_TOKENS)
    engine = Engine(scheduler, runner, frozenset())
    for number in range(num_requests):
        engine.add(make_request(number, length))
    engine.step()
    return engine


def make_request(number: int, length: int) -> Request:
    """A prompt of its own with a picture of its own; lengths differ, so that not all fill a block in the same step."""
    layout = ItemLayout((Run(3, PICTURE_TOKENS),), {"pixel_values": TensorSpec("float32", (1,))})
    digest = hashlib.sha256(str(number).encode()).digest()
    place = PlaceholderRange(8, PICTURE_TOKENS)
    item = EngineItem(place, "image", layout, {"pixel_values": torch.zeros(1)}, content_digest=digest)
    token_ids = [1 + (number + index) % 7 for index in range(PROMPT_TOKENS + number % BLOCK_SIZE)]
    params = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
    return Request(number, token_ids, [item], params, len(token_ids) + length)


def measure(num_requests: int, num_steps: int) -> dict[str, list[float]]:
    """Seconds of every step by stage; `step` is the whole step, `send` the report's way into the pipe."""
    engine, watch = make_engine(num_requests, num_steps), Stopwatch()
    watch.watch(engine.scheduler, "schedule", "schedule")
    watch.watch(engine.runner, "_forward", "prepare inputs")
    watch.watch(engine.runner.sampler, "sample", "sample")
    watch.watch(engine, "_update", "update")
    watch.watch(engine, "_report", "report")
    step = watch.timed(engine.step, "step")
    send = watch.timed(lambda report: pickle.dumps(report, pickle.HIGHEST_PROTOCOL), "send")
    steps: dict[str, list[float]] = defaultdict(list)
    for index in range(WARM_UP + num_steps):
        watch.seconds.clear()
        report = step()
        assert len(getattr(report, "tokens", report).token_ids) == num_requests  # one piece in older trees
        send(report)
        if index >= WARM_UP:
            for stage, seconds in watch.seconds.items():
                steps[stage].append(seconds)
            steps["scheduling and bookkeeping"].append(sum(watch.seconds[stage] for stage in BOOKKEEPING))
    return steps


def profile(num_requests: int, num_steps: int) -> list[dict[str, Any]]:
    """The functions that take most, by their own time, in microseconds per step as the profiler sees them."""
    engine = make_engine(num_requests, num_steps)
    profiler = cProfile.Profile()
    with profiler:
        for _ in range(num_steps):
            engine.step()
    stats: Any = pstats.Stats(profiler)
    rows = sorted(stats.stats.items(), key=lambda entry: -entry[1][2])[:15]
    return [
        {
            "function": f"{file.rpartition('/')[2]}:{name}" if line else name,
            "calls_per_step": calls / num_steps,
            "own_us_per_step": 1e6 * own / num_steps,
        }
        for (file, line, name), (_, calls, own, _, _) in rows
    ]


def main(argv: list[str]) -> None:
    """Print, by number of requests, {"steps": seconds by stage, "profile": functions}."""
    num_steps, is_profiled, *counts = (int(argument) for argument in argv)
    torch.set_num_threads(1)
    results: dict[int, Any] = {}
    for count in counts:
        results[count] = {"steps": measure(count, num_steps)}
        if is_profiled:
            results[count]["profile"] = profile(count, num_steps)
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
