"""Prompts through the engine, with the logits of every token on record."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from executor_service.checks.features import BLOCK_SIZE, make_item
from executor_service.checks.prompts import NEW_TOKENS, Prompt
from executor_service.checks.trial import CPU, Trial
from executor_service.engine.block_manager import BlockManager
from executor_service.engine.core import Engine
from executor_service.engine.encoder_cache import EncoderCache
from executor_service.engine.kv_cache import allocate_kv_caches
from executor_service.engine.limits import EngineLimits
from executor_service.engine.messages import SamplingParams
from executor_service.engine.model_runner import ModelOutput, ModelRunner
from executor_service.engine.request import Request
from executor_service.engine.scheduler import ScheduledBatch, Scheduler
from executor_service.models.protocol import kv_geometry

GREEDY = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)


@dataclass(frozen=True)
class Answer:
    """Greedy tokens, and logits [T, vocabulary] of the prompt and all of them but the last."""

    token_ids: list[int]
    logits: Tensor


class Recorder(ModelRunner):
    """A runner that keeps the hidden states of every token, by request."""

    def __init__(self, trial: Trial, limits: EngineLimits) -> None:
        super().__init__(trial.model, CPU, trial.dtype, limits)
        self.tells_requests = False
        self.hidden: dict[int, list[Tensor]] = defaultdict(list)

    def execute(self, batch: ScheduledBatch) -> ModelOutput:
        """One step; RuntimeError where an item cannot be encoded."""
        seen: list[Tensor] = []
        handle = self.model.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            output = super().execute(batch)
        finally:
            handle.remove()
        if output.failed:
            raise RuntimeError(str(output.failed[0][1]))
        lengths = [scheduled.num_tokens for scheduled in batch.requests]
        for scheduled, rows in zip(batch.requests, seen[-1].split(lengths), strict=True):
            self.hidden[scheduled.request.request_id].append(rows)
        return output


@dataclass
class Run:
    """How prompts go through the engine: `budget` tokens per step; `positions` other than the model's own."""

    trial: Trial
    budget: int = 1 << 20
    positions: dict[int, np.ndarray] = field(default_factory=dict)

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """All prompts in one batch."""
        longest = max(len(prompt.token_ids) for prompt in prompts) + NEW_TOKENS
        recorder = Recorder(self.trial, EngineLimits(self.budget, len(prompts), self.budget, longest, BLOCK_SIZE))
        requests = [self._request(recorder, index, prompt) for index, prompt in enumerate(prompts)]
        blocks = BlockManager(sum(-(-request.max_tokens // BLOCK_SIZE) for request in requests), BLOCK_SIZE)
        geometry = kv_geometry(self.trial.model, self.trial.family.ctx.text_config)
        recorder.kv_caches = allocate_kv_caches(geometry, blocks.num_blocks, recorder)
        features = EncoderCache(sum(item.layout.num_tokens for request in requests for item in request.items))
        scheduler = Scheduler(blocks, features, len(requests), self.budget, self.budget)
        engine = Engine(scheduler, recorder, frozenset(), True)
        for request in requests:
            engine.add(request)
        while engine.has_work:
            engine.step()
        return [_answer(recorder, request) for request in requests]

    def _request(self, recorder: Recorder, number: int, prompt: Prompt) -> Request:
        items = [
            make_item(self.trial, item, place) for item, place in zip(prompt.items, prompt.placeholders, strict=True)
        ]
        positions, delta = recorder.prompt_positions(prompt.token_ids, items)
        length = len(prompt.token_ids) + NEW_TOKENS
        positions = self.positions.get(number, positions)
        return Request(number, prompt.token_ids, items, GREEDY, length, positions=positions, decode_delta=delta)


def _answer(recorder: Recorder, request: Request) -> Answer:
    hidden = torch.cat(recorder.hidden[request.request_id])
    tokens = request.token_ids[request.num_prompt_tokens : request.num_tokens].tolist()
    return Answer(tokens, recorder.model.compute_logits(hidden))
