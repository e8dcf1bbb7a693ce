"""Which tokens a request's prompt has and how often each is in its output, on the device, for penalties.

A table with a slot per request, brought up to date with the tokens that are new since the last look. It is a cache
of what the requests' own token ids say: a request that lost its slot, or was preempted, is counted again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from executor_service.engine.request import Request


@dataclass
class _Slot:
    """A row of the table; the first `num_counted` tokens of its request are in it."""

    index: int
    num_counted: int = 0


class TokenCounts:
    """`prompt_seen` bool and `output_counts` int32, both [slots, vocabulary].

    It has as many slots as one call of `update` ever named requests; the least recently used slot goes first.
    """

    def __init__(self, device: torch.device) -> None:
        self.prompt_seen = torch.zeros((0, 0), dtype=torch.bool, device=device)
        self.output_counts = torch.zeros((0, 0), dtype=torch.int32, device=device)
        self._slots: OrderedDict[int, _Slot] = OrderedDict()

    def update(self, requests: Sequence[Request], vocabulary: int) -> Tensor:
        """Count the requests' new tokens; their slots, int64 [R].

        Ids of `vocabulary` and above have no logit (placeholders of some families) and are not counted.
        """
        self._make_room(requests, vocabulary)
        slots = [self._slot_of(request) for request in requests]
        prompt, output = _Pairs(vocabulary), _Pairs(vocabulary)
        for request, slot in zip(requests, slots, strict=True):
            middle = request.num_prompt_tokens
            prompt.add(slot.index, request.token_ids[slot.num_counted : middle])
            output.add(slot.index, request.token_ids[max(slot.num_counted, middle) : request.num_tokens])
            slot.num_counted = request.num_tokens
        device = self.prompt_seen.device
        self.prompt_seen[prompt.tensors(device)] = True
        rows, token_ids = output.tensors(device)
        ones = torch.ones(len(rows), dtype=torch.int32, device=device)
        self.output_counts.index_put_((rows, token_ids), ones, accumulate=True)
        return torch.tensor([slot.index for slot in slots], device=device)

    def release(self, request_id: int) -> None:
        """Forget a request; nothing happens if it has no slot."""
        self._slots.pop(request_id, None)

    def _make_room(self, requests: Sequence[Request], vocabulary: int) -> None:
        """At least as many slots as requests, each request's own kept."""
        have, width = self.prompt_seen.shape
        if have >= len(requests) and width == vocabulary:
            return
        for name in ("prompt_seen", "output_counts"):
            old: Tensor = getattr(self, name)
            new = old.new_zeros((max(have, len(requests)), vocabulary))
            new[:have, :width] = old
            setattr(self, name, new)

    def _slot_of(self, request: Request) -> _Slot:
        """The request's slot; a new one is empty. What `update` was asked for is used last, so it stays."""
        if (slot := self._slots.get(request.request_id)) is None:
            slot = self._slots[request.request_id] = _Slot(self._free_index())
            self.prompt_seen[slot.index] = False
            self.output_counts[slot.index] = 0
        self._slots.move_to_end(request.request_id)
        return slot

    def _free_index(self) -> int:
        if len(self._slots) >= len(self.prompt_seen):
            return self._slots.popitem(last=False)[1].index
        used = {slot.index for slot in self._slots.values()}
        return next(index for index in range(len(self.prompt_seen)) if index not in used)


class _Pairs:
    """(slot, token id) pairs in the making."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._slots: list[np.ndarray] = []
        self._token_ids: list[np.ndarray] = []

    def add(self, slot: int, token_ids: np.ndarray) -> None:
        if len(token_ids):
            counted = token_ids[token_ids < self._vocabulary]
            self._token_ids.append(counted)
            self._slots.append(np.full(len(counted), slot, dtype=np.int64))

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Two int64 [N], on the device."""
        empty = np.empty(0, dtype=np.int64)
        slots, token_ids = np.concatenate([empty, *self._slots]), np.concatenate([empty, *self._token_ids])
        return torch.from_numpy(slots).to(device), torch.from_numpy(token_ids).to(device)
