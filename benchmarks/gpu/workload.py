"""The workload of the GPU benchmarks, and a driver that calls `Engine.step` itself and notes what every step brought.

One request is one picture nobody has seen before, 64 text tokens and 128 greedy output tokens, end of text ignored.
Tensors are at hand: pages that the GPU can read, as the front's arena.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.load import OUTPUT_TOKENS, TEXT_TOKENS
from executor_service.engine.boot import BootedEngine, boot
from executor_service.engine.messages import BootProgress, EngineConfig, SamplingParams
from executor_service.engine.request import EngineItem, Request
from executor_service.kernels.cuda import ahead
from registry import MediaInfo, ProcessorInputs


@dataclass(frozen=True)
class EngineStep:
    """When a step's report came, the tokens each request had by then, and what the step computed."""

    time: float
    num_tokens: dict[int, int]
    num_scheduled_tokens: int


@dataclass
class Trace:
    """A drive: when it began and was submitted, and the steps that brought tokens."""

    began: float
    submitted: float = 0.0
    steps: list[EngineStep] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """From the first submission to the last token."""
        return self.steps[-1].time - self.began

    def decode_intervals(self, batch: int) -> list[float]:
        """Seconds between steps in which all `batch` requests got a token and none its first."""
        return [
            now.time - before.time
            for before, now in itertools.pairwise(self.steps)
            if len(before.num_tokens) == len(now.num_tokens) == batch and min(now.num_tokens.values()) > 2
        ]

    def token_intervals(self) -> list[float]:
        """Seconds between any request's successive tokens, all requests together."""
        last: dict[int, float] = {}
        intervals = []
        for step in self.steps:
            for number in step.num_tokens:
                if number in last:
                    intervals.append(step.time - last[number])
                last[number] = step.time
        return intervals

    def first_tokens(self) -> dict[int, float]:
        """When each request's first token came."""
        firsts: dict[int, float] = {}
        for step in self.steps:
            for number in step.num_tokens:
                firsts.setdefault(number, step.time)
        return firsts


class OverTimeError(RuntimeError):
    """A drive did not end in the time it had."""


class Driver:
    """A booted engine and its requests. `log` gets every boot stage."""

    def __init__(self, model: Path, log: Callable[[BootProgress], None] = lambda progress: None, **config: Any) -> None:
        began = time.perf_counter()
        self.config = EngineConfig(model_dir=model, **{"prefix_caching": False, **config})
        if self.config.device != "cpu":
            ahead.begin()  # as the engine process does, whose context has small stacks
        self.booted: BootedEngine = boot(self.config, log)
        self.boot_seconds = time.perf_counter() - began
        self.engine, self.family = self.booted.engine, self.booted.family
        self._numbers = itertools.count(1)

    @property
    def is_cuda(self) -> bool:
        """Whether it runs on a GPU."""
        return self.booted.report.device.startswith("cuda")

    def requests(
        self, count: int, side: int, max_tokens: int = OUTPUT_TOKENS, seed: int = 0, text_tokens: int = TEXT_TOKENS,
        **sampling: Any,
    ) -> list[Request]:  # fmt: skip
        """`count` requests with a picture of `side` x `side` random pixels each; `side` 0: none."""
        rng = np.random.default_rng([seed, count, side])
        return [self._request(rng, side, max_tokens, text_tokens, sampling) for _ in range(count)]

    def _request(
        self, rng: np.random.Generator, side: int, max_tokens: int, text_tokens: int, sampling: dict[str, Any]
    ) -> Request:
        number = next(self._numbers)
        infos = [MediaInfo.image(side, side)] if side else []
        placeholder = self.family.ctx.model_config.image_token_id
        text = rng.integers(3, placeholder, text_tokens).tolist()
        inputs = self.family.process(ProcessorInputs([*[placeholder] * len(infos), *text], infos))
        items = [
            EngineItem(place, "image", layout, self._tensors(rng, layout), content_digest=_digest(number, seed=text[0]))
            for place, layout in zip(inputs.placeholders, inputs.layouts, strict=True)
        ]
        positions, delta = self.engine.runner.prompt_positions(inputs.prompt_token_ids, items)
        values = {"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True, **sampling}
        return Request(
            number, inputs.prompt_token_ids, items, SamplingParams(**values), self.booted.report.max_model_len,
            positions=positions, decode_delta=delta,
        )  # fmt: skip

    def _tensors(self, rng: np.random.Generator, layout: Any) -> dict[str, torch.Tensor]:
        """Random tensors of the layout's dtypes and shapes."""
        tensors = {}
        for name, spec in layout.tensors.items():
            if spec.dtype != "uint8":
                raise ValueError(f"{name} is {spec.dtype}; these benchmarks make uint8 pixels")
            tensor = torch.from_numpy(rng.integers(0, 256, spec.shape, dtype=np.uint8))
            tensors[name] = tensor.pin_memory() if self.is_cuda else tensor
        return tensors

    def drive(self, requests: Sequence[Request], limit: float = 120.0, arrivals: Sequence[float] = ()) -> Trace:
        """Submit all requests, each `arrivals` seconds after the beginning or at once, and step until all have ended.

        OverTimeError after `limit` seconds; RuntimeError if a request ends before it has all its tokens.
        """
        if self.is_cuda:
            torch.cuda.synchronize()
        pending = list(zip(arrivals or [0.0] * len(requests), requests, strict=True))[::-1]
        counts: dict[int, int] = {}
        trace = Trace(time.perf_counter())
        while pending or self.engine.has_work:
            self._submit(pending, trace)
            if not self.engine.has_work:
                time.sleep(0.0002)
                continue
            self._step(trace, counts)
            if time.perf_counter() - trace.began > limit:
                self.abandon(requests)
                raise OverTimeError(f"{len(counts)} of {len(requests)} requests had tokens after {limit:g} s")
        short = [r.request_id for r in requests if counts.get(r.request_id) != r.max_tokens - r.num_prompt_tokens]
        if short:
            raise RuntimeError(f"requests {short[:5]} ended early: {requests[0].error}")
        return trace

    def _submit(self, pending: list[tuple[float, Request]], trace: Trace) -> None:
        while pending and time.perf_counter() - trace.began >= pending[-1][0]:
            request = pending.pop()[1]
            request.arrived = time.monotonic()
            self.engine.add(request)
        if not pending and not trace.submitted:
            trace.submitted = time.perf_counter()

    def _step(self, trace: Trace, counts: dict[int, int]) -> None:
        report = self.engine.step()
        now = time.perf_counter()
        for number in report.tokens.request_ids:
            counts[number] = counts.get(number, 0) + 1
        if report.tokens.request_ids:
            fresh = {number: counts[number] for number in report.tokens.request_ids}
            trace.steps.append(EngineStep(now, fresh, report.end.num_scheduled_tokens))

    def decoding(self, requests: Sequence[Request], limit: float = 120.0) -> Iterator[None]:
        """Submit, and run until every request has had two tokens; then one step per iteration until one ends.

        OverTimeError if one has ended by then.
        """
        counts: dict[int, int] = {}
        trace = Trace(time.perf_counter())
        for request in requests:
            self.engine.add(request)
        while len(counts) < len(requests) or min(counts.values()) < 2:
            self._step(trace, counts)
            if time.perf_counter() - trace.began > limit:
                self.abandon(requests)
                raise OverTimeError(f"{len(counts)} of {len(requests)} requests decoded after {limit:g} s")
        if any(request.is_finished for request in requests):
            self.abandon(requests)
            raise OverTimeError(f"the first of {len(requests)} requests ended before the last decoded")
        while all(not request.is_finished for request in requests):
            yield self._step(trace, counts)

    def abandon(self, requests: Sequence[Request]) -> None:
        """End what still runs of these requests."""
        self.engine.abort([request.request_id for request in requests])
        while self.engine.has_work:
            self.engine.step()


def _digest(number: int, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}/{number}".encode()).digest()
