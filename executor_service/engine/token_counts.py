"""Which tokens a request's prompt has and how often each is in its output, on the device, for penalties.

A row of each table per slot. It is written when a request gets the slot; from then on the op that draws a token adds
it, so that nobody has to know it on the host. What the host knows is how many tokens a row has counted.
"""

from __future__ import annotations

import numpy as np
import torch

from executor_service.engine.request import Request
from executor_service.engine.transfers import copy_to
from executor_service.kernels.sample import MAX_OUTPUT_COUNT

_ALIGNED = 128
"""Rows of both tables are multiples of 16 bytes."""


class TokenCounts:
    """`prompt_seen` uint8 [slots, bits in bytes] and `output_counts` int16 [slots, vocabulary and padding].

    Ids of `vocab_size` and above have no logit (placeholders of some families) and are not counted.
    """

    def __init__(self, device: torch.device, num_slots: int, vocab_size: int) -> None:
        width = -(-vocab_size // _ALIGNED) * _ALIGNED
        self.prompt_seen = torch.zeros((num_slots, width // 8), dtype=torch.uint8, device=device)
        self.output_counts = torch.zeros((num_slots, width), dtype=torch.int16, device=device)
        self._vocab_size = vocab_size
        self._num_counted = [0] * num_slots

    def begin(self, slot: int, request: Request) -> None:
        """Count the tokens that the request has; none of them may be in flight."""
        if request.num_inflight_tokens:
            raise RuntimeError(f"request {request.request_id} has tokens in flight: they cannot be counted yet")
        prompt, output = request.token_ids[: request.num_prompt_tokens], request.output_token_ids
        copy_to(self.prompt_seen[slot], np.packbits(self._counted(prompt) > 0, bitorder="little"))
        if len(output):
            counts = np.minimum(self._counted(output), MAX_OUTPUT_COUNT)
            copy_to(self.output_counts[slot], counts.astype(np.int16))
        else:
            self.output_counts[slot].zero_()
        self._num_counted[slot] = request.num_tokens

    def follow(self, slot: int, request: Request) -> None:
        """The request's next token is about to be drawn: count anew if that is not the one the row waits for."""
        if self._num_counted[slot] != request.num_expected_tokens:
            self.begin(slot, request)
        self._num_counted[slot] += 1

    def _counted(self, token_ids: np.ndarray) -> np.ndarray:
        width = self.output_counts.shape[-1]
        counts: np.ndarray = np.bincount(token_ids[token_ids < self._vocab_size], minlength=width)
        return counts
