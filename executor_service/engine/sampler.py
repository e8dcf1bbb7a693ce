"""From logits to tokens: what each request's parameters make of its row, vectorised over the batch.

Log probabilities are of the model's own distribution. Then, in this order: logit bias, penalties, bans (bad words,
end-of-text before `min_tokens`); greedy, or temperature, min-p, top-k, top-p and a draw. The arithmetic is in
`logits.py`; here is who needs which part of it, so that plain rows pay for nothing they did not ask for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from executor_service.engine.logits import Filters, Penalties, add_bias, ban, draw, filtered_probabilities, penalize
from executor_service.engine.logprobs import token_logprobs
from executor_service.engine.messages import TokenLogprobs
from executor_service.engine.random_numbers import uniform_numbers
from executor_service.engine.request import Request
from executor_service.engine.token_counts import TokenCounts


@dataclass(frozen=True)
class SampledTokens:
    """`token_ids` [R] and, where asked for, each row's log probabilities."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


class Sampler:
    """Chooses tokens. `eos_token_ids` are what `min_tokens` holds back.

    Its only state is a cache of token counts: call `release` for every request that has ended.
    """

    def __init__(self, device: torch.device, eos_token_ids: frozenset[int] = frozenset()) -> None:
        self._device = device
        self._eos_token_ids = np.array(sorted(eos_token_ids), dtype=np.int64)
        self._counts = TokenCounts(device)

    def sample(self, logits: Tensor, requests: Sequence[Request]) -> SampledTokens:
        """Logits [R, vocabulary], of each request's last token -> its next token."""
        tokens = logits.argmax(dim=-1)
        changed = [row for row, request in enumerate(requests) if request.changes_logits]
        adjusted = self._adjust(logits, [requests[row] for row in changed], changed) if changed else None
        if adjusted is not None:
            tokens[changed] = adjusted.argmax(dim=-1)
        rows = [row for row, request in enumerate(requests) if request.sampling.temperature > 0]
        if rows:
            tokens[rows] = self._draw(_rows(logits, rows, adjusted, changed), [requests[row] for row in rows])
        token_ids: list[int] = tokens.tolist()
        return SampledTokens(token_ids, _logprobs(logits, requests, token_ids))

    def release(self, request_id: int) -> None:
        """A request has ended."""
        self._counts.release(request_id)

    def _adjust(self, logits: Tensor, requests: list[Request], rows: list[int]) -> Tensor:
        """What biases, penalties and bans make of those rows: float64 [len(rows), vocabulary]."""
        adjusted = logits[rows].to(torch.float64)
        biases = [request.constraints.bias_token_ids for request in requests]
        if any(map(len, biases)):
            values = np.concatenate([request.constraints.bias_values for request in requests])
            add_bias(adjusted, *self._places(biases), torch.from_numpy(values).to(self._device))
        self._penalize(adjusted, requests)
        bans = [request.constraints.banned(request.output_token_ids, self._eos_token_ids) for request in requests]
        if any(map(len, bans)):
            ban(adjusted, *self._places(bans))
        return adjusted

    def _penalize(self, adjusted: Tensor, requests: list[Request]) -> None:
        rows = [row for row, request in enumerate(requests) if request.sampling.has_penalties]
        if not rows:
            return
        penalized = [requests[row] for row in rows]
        slots = self._counts.update(penalized, adjusted.shape[-1])
        adjusted[rows] = penalize(
            adjusted[rows],
            self._counts.prompt_seen[slots],
            self._counts.output_counts[slots],
            Penalties.of([request.sampling for request in penalized], self._device),
        )

    def _places(self, token_ids: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Rows and ids, int64 [N], of a list of ids per row."""
        rows = np.repeat(np.arange(len(token_ids)), [len(ids) for ids in token_ids])
        return torch.from_numpy(rows).to(self._device), torch.from_numpy(np.concatenate(token_ids)).to(self._device)

    def _draw(self, logits: Tensor, requests: list[Request]) -> Tensor:
        params = [request.sampling for request in requests]
        uniforms = uniform_numbers([param.seed for param in params], [request.num_tokens for request in requests])
        probabilities = filtered_probabilities(logits, Filters.of(params, self._device))
        return draw(probabilities, torch.from_numpy(uniforms).to(self._device))


def _rows(logits: Tensor, rows: list[int], adjusted: Tensor | None, changed: list[int]) -> Tensor:
    """Those rows of the logits, adjusted where `changed` has them; float64 in that case."""
    if adjusted is None:
        return logits[rows]
    place_of = {row: place for place, row in enumerate(changed)}
    here = [place for place, row in enumerate(rows) if row in place_of]
    chosen = logits[rows].to(torch.float64)
    chosen[here] = adjusted[[place_of[rows[place]] for place in here]]
    return chosen


def _logprobs(logits: Tensor, requests: Sequence[Request], token_ids: list[int]) -> list[TokenLogprobs | None]:
    """For the rows that ask."""
    result: list[TokenLogprobs | None] = [None] * len(requests)
    rows = [row for row, request in enumerate(requests) if request.sampling.logprobs is not None]
    if rows:
        counts = [requests[row].sampling.logprobs or 0 for row in rows]
        entries = token_logprobs(logits[rows], [token_ids[row] for row in rows], counts)
        for row, entry in zip(rows, entries, strict=True):
            result[row] = entry
    return result
