"""From logits to tokens: every request's parameters are on the device, one op draws, and results come back later.

What is drawn and in which order is said in `kernels/sample.py`. Nothing here waits for the device but
`PendingTokens.result`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from executor_service.engine.messages import TokenLogprobs
from executor_service.engine.request import Request
from executor_service.engine.sampling_slots import SamplingSlots
from executor_service.engine.transfers import HostCopy, to_device
from executor_service.kernels.sample import Sampled, rows_at_once, sample


@dataclass(frozen=True)
class SampledTokens:
    """`token_ids` [R] and, where asked for, each row's log probabilities."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


class PendingTokens:
    """Tokens that the device has or will have: `token_ids` int64 [R] are there, `result` brings them to the host.

    `num_logprobs` [R]: how many of the likeliest tokens each row wants to know of; None: no log probabilities.
    """

    def __init__(self, sampled: Sampled, num_logprobs: Sequence[int | None], vocab_size: int) -> None:
        self.token_ids: Tensor = sampled.token_ids
        self._num_logprobs = num_logprobs
        self._vocab_size = vocab_size
        asks = any(count is not None for count in num_logprobs)
        # The last copy is waited for first; by then the others have arrived.
        self._copies = [HostCopy(part) for part in (sampled if asks else sampled[:1])]
        self._result: SampledTokens | None = None

    @classmethod
    def none(cls, device: torch.device) -> PendingTokens:
        """Of a step without a row."""
        return cls(Sampled(*(torch.empty(0, dtype=torch.int64, device=device) for _ in Sampled._fields)), (), 0)

    def result(self) -> SampledTokens:
        """The tokens on the host; waits until they have been drawn."""
        if self._result is None:
            token_ids, *scores = (copy.wait() for copy in self._copies)
            nothing: list[TokenLogprobs | None] = [None] * len(token_ids)
            logprobs = self._logprobs(token_ids, *scores) if scores else nothing
            self._result = SampledTokens(token_ids.tolist(), logprobs)
        return self._result

    def _logprobs(self, token_ids: np.ndarray, logprobs: np.ndarray, top_ids: np.ndarray) -> list[TokenLogprobs | None]:
        result: list[TokenLogprobs | None] = [None] * len(token_ids)
        for row, count in enumerate(self._num_logprobs):
            if count is not None:
                last = min(count, self._vocab_size)
                top = zip(top_ids[row, :last].tolist(), logprobs[row, 1 : 1 + last].tolist(), strict=True)
                result[row] = TokenLogprobs(int(token_ids[row]), float(logprobs[row, 0]), tuple(top))
        return result


class Sampler:
    """Chooses tokens. `eos_token_ids` are what `min_tokens` holds back.

    It keeps parameters and token counts of up to `max_num_seqs` requests, in tables of fixed size and address: call
    `release` for every request that has ended.
    """

    def __init__(
        self,
        device: torch.device,
        max_num_seqs: int,
        vocab_size: int,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._device = device
        self._at_once = rows_at_once(device)
        self.slots = SamplingSlots(device, max_num_seqs, vocab_size, eos_token_ids)

    def sample(self, logits: Tensor, requests: Sequence[Request]) -> PendingTokens:
        """Logits [R, vocabulary], of each request's last token -> its next token, number `num_expected_tokens`.

        The caller then counts the token as in flight or appends it. Work is enqueued on the current stream.
        """
        if not requests:
            return PendingTokens.none(self._device)
        slots = self.slots.prepare(requests)
        step = [slots, [request.num_expected_tokens for request in requests]]
        if self._at_once is not None and (order := self.slots.order(slots, self._at_once)) is not None:
            step.append(order.tolist())
        places, numbers, *orders = to_device(np.array(step), self._device)
        sampled = sample(logits, places, numbers, self.slots.tables, *orders)
        return PendingTokens(sampled, [request.sampling.logprobs for request in requests], logits.shape[-1])

    def release(self, request_id: int) -> None:
        """A request has ended."""
        self.slots.release(request_id)
