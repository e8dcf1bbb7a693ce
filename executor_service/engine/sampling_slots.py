"""The sampling op's tables, and which request has which of their rows.

A row is written when a request first appears, or comes back after it lost its slot to others; then it stays as it is,
but for what depends on output values (bad words).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from executor_service.engine.request import Request
from executor_service.engine.token_counts import TokenCounts
from executor_service.engine.transfers import copy_to
from executor_service.kernels.sample import Integer, Real, SamplingTables, cost_of, longest_first

MAX_BIASES: Final = 1024
"""Of one request, as `SamplingParams.logit_bias` in the protocol."""
MAX_BAD_WORDS: Final = 256
MAX_STOP_TOKEN_IDS: Final = 64


@dataclass(frozen=True)
class _Slot:
    """`changes`: something in its row has to follow the request from step to step."""

    index: int
    request: Request
    changes: bool


class SamplingSlots:
    """Tables with `num_slots` rows, on the device. Where all are taken, a request that is not in the step loses its."""

    def __init__(
        self, device: torch.device, num_slots: int, vocab_size: int, eos_token_ids: frozenset[int] = frozenset()
    ) -> None:
        self._eos_token_ids = np.array(sorted(eos_token_ids), dtype=np.int64)
        max_bans = MAX_BAD_WORDS + MAX_STOP_TOKEN_IDS + len(eos_token_ids)
        self.counts = TokenCounts(device, num_slots, vocab_size)
        self.tables = SamplingTables(
            reals=torch.zeros((num_slots, len(Real)), dtype=torch.float64, device=device),
            integers=torch.zeros((num_slots, len(Integer)), dtype=torch.int64, device=device),
            bias_ids=torch.empty((num_slots, MAX_BIASES), dtype=torch.int32, device=device),
            bias_values=torch.empty((num_slots, MAX_BIASES), dtype=torch.float64, device=device),
            ban_ids=torch.empty((num_slots, max_bans), dtype=torch.int32, device=device),
            prompt_seen=self.counts.prompt_seen,
            output_counts=self.counts.output_counts,
        )
        self._costs = np.zeros(num_slots, dtype=np.int64)
        self._slots: dict[int, _Slot] = {}
        self._free = list(range(num_slots - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._slots)

    def prepare(self, requests: Sequence[Request]) -> list[int]:
        """Each request's slot; afterwards its row says what its next token depends on."""
        get = self._slots.get
        slots = [get(request.request_id) for request in requests]
        for row, (slot, request) in enumerate(zip(slots, requests, strict=True)):
            if slot is None or slot.request is not request:
                slots[row] = self._begin(request, requests)
            elif slot.changes:
                self._follow(slot)
        return [slot.index for slot in slots if slot is not None]

    def order(self, slots: Sequence[int], at_once: int) -> np.ndarray | None:
        """The order in which the rows of a step begin best if so many of them run at once; None: any."""
        return longest_first(self._costs[slots], at_once)

    def release(self, request_id: int) -> None:
        """Forget a request; nothing happens if it has no slot."""
        if (slot := self._slots.pop(request_id, None)) is not None:
            self._free.append(slot.index)

    def _begin(self, request: Request, step: Sequence[Request]) -> _Slot:
        """A slot for a request that has none, among those of one step."""
        self.release(request.request_id)
        if not self._free:
            staying = {other.request_id for other in step}
            self.release(next(number for number in self._slots if number not in staying))
        changes = request.needs_output_on_host or request.sampling.has_penalties
        slot = self._slots[request.request_id] = _Slot(self._free.pop(), request, changes)
        self._write(slot.index, request)
        if request.sampling.has_penalties:
            self.counts.follow(slot.index, request)
        return slot

    def _follow(self, slot: _Slot) -> None:
        if slot.request.needs_output_on_host:
            self._write_bans(slot.index, slot.request)
        if slot.request.sampling.has_penalties:
            self.counts.follow(slot.index, slot.request)

    def _write(self, index: int, request: Request) -> None:
        sampling, constraints = request.sampling, request.constraints
        reals = (sampling.temperature, sampling.min_p, sampling.top_p, sampling.repetition_penalty,
                 sampling.presence_penalty, sampling.frequency_penalty)  # fmt: skip
        copy_to(self.tables.reals[index], np.array(reals, dtype=np.float64))
        if num_biases := len(constraints.bias_token_ids):
            copy_to(self.tables.bias_ids[index, :num_biases], constraints.bias_token_ids.astype(np.int32))
            copy_to(self.tables.bias_values[index, :num_biases], constraints.bias_values)
        self._write_bans(index, request)
        if sampling.has_penalties:
            self.counts.begin(index, request)

    def _write_bans(self, index: int, request: Request) -> None:
        """The bans, and the integers, which say how many they are."""
        sampling, constraints = request.sampling, request.constraints
        banned, held_back = constraints.banned(request.output_token_ids), constraints.held_back(self._eos_token_ids)
        if num_bans := len(banned) + len(held_back):
            copy_to(self.tables.ban_ids[index, :num_bans], np.concatenate([banned, held_back]).astype(np.int32))
        integers: dict[Integer, Any] = {
            Integer.SEED: np.uint64(sampling.seed).astype(np.int64),
            Integer.TOP_K: sampling.top_k,
            Integer.NUM_LOGPROBS: -1 if sampling.logprobs is None else sampling.logprobs,
            Integer.HAS_PENALTIES: sampling.has_penalties,
            Integer.NUM_BIASES: len(constraints.bias_token_ids),
            Integer.NUM_BANS: len(banned),
            Integer.NUM_HELD_BACK: len(held_back),
            Integer.HELD_BACK_UNTIL: request.num_prompt_tokens + sampling.min_tokens,
        }
        self._costs[index] = cost_of(sampling.temperature, sampling.top_p, integers)
        copy_to(self.tables.integers[index], np.array([integers[column] for column in Integer], dtype=np.int64))
