"""Log probabilities of the model's own distribution, before anything that sampling does to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Final

import numpy as np
import torch
from torch import Tensor

from executor_service.engine.messages import TokenLogprobs
from executor_service.engine.request import Request
from executor_service.engine.scheduler import ScheduledRequest
from executor_service.engine.transfers import HostCopy, to_device

ROWS_AT_ONCE: Final = 64
"""Prompt positions whose logits exist at the same time, so that a long prompt needs no more memory than a short one."""

PromptLogprobs = tuple[Request, list[TokenLogprobs]]
"""A request and the log probabilities of its next prompt tokens."""


class PendingLogprobs:
    """The log probability of one token per row of logits [R, vocabulary], and of its row's `num_top` likeliest tokens.

    Computed in float64. A token id without a logit (placeholders of some families) has the log probability -inf.
    """

    def __init__(self, logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> None:
        self._token_ids, self._num_top = token_ids, num_top
        vocabulary = logits.shape[-1]
        logprobs = logits.to(torch.float64).log_softmax(dim=-1)
        ids = to_device(np.array(token_ids, dtype=np.int64), logits.device)
        gathered = logprobs.gather(-1, ids.clamp(max=vocabulary - 1)[:, None]).squeeze(-1)
        self._chosen = HostCopy(gathered.masked_fill(ids >= vocabulary, float("-inf")))
        self._values, self._indices = map(HostCopy, logprobs.topk(min(max(num_top), vocabulary), dim=-1))

    def result(self) -> list[TokenLogprobs]:
        """One entry per row; waits until they are on the host."""
        chosen, values, indices = (copy.wait().tolist() for copy in (self._chosen, self._values, self._indices))
        return [
            TokenLogprobs(token_id, chosen[row], tuple(zip(indices[row][:count], values[row][:count], strict=True)))
            for row, (token_id, count) in enumerate(zip(self._token_ids, self._num_top, strict=True))
        ]


class PendingPromptLogprobs:
    """What a step says of prompt tokens; going through it waits until that is on the host."""

    def __init__(
        self,
        requests: Sequence[Request] = (),
        counts: Sequence[int] = (),
        parts: Sequence[PendingLogprobs] = (),
    ) -> None:
        self._requests, self._counts, self._parts = requests, counts, parts

    def __iter__(self) -> Iterator[PromptLogprobs]:
        scores = [entry for part in self._parts for entry in part.result()]
        for request, (begin, end) in zip(self._requests, pairwise(np.cumsum([0, *self._counts])), strict=True):
            if begin < end:
                yield request, scores[begin:end]


def prompt_logprobs(
    batch: Sequence[ScheduledRequest], hidden: Tensor, ends: np.ndarray, compute_logits: Callable[[Tensor], Tensor]
) -> PendingPromptLogprobs:
    """For the requests that ask: what this step's chunks say of the prompt tokens that follow them.

    `hidden` [T, width] of the flattened batch, `ends` [R] where each request ends in it. Position i tells of token
    i + 1. What was given before a preemption is not given again.
    """
    asking = [row for row, scheduled in enumerate(batch) if scheduled.request.scores_prompt]
    if not asking:
        return PendingPromptLogprobs()
    requests: list[Request] = []
    counts: list[int] = []
    rows: list[np.ndarray] = []
    for row in asking:
        scheduled = batch[row]
        first, last = _next_scores(scheduled)
        begin = int(ends[row]) - scheduled.num_tokens - scheduled.request.num_computed_tokens
        requests.append(scheduled.request)
        counts.append(max(last - first, 0))
        rows.append(np.arange(first, last) - 1 + begin)
    return PendingPromptLogprobs(
        requests, counts, _score(requests, counts, np.concatenate(rows), hidden, compute_logits)
    )


def _next_scores(scheduled: ScheduledRequest) -> tuple[int, int]:
    """The prompt tokens, from first to before last, that this chunk is the first to tell of."""
    request = scheduled.request
    end = request.num_computed_tokens + scheduled.num_tokens
    return request.num_scored_tokens, min(end + 1, request.num_prompt_tokens)


def _score(
    requests: list[Request],
    counts: list[int],
    rows: np.ndarray,
    hidden: Tensor,
    compute_logits: Callable[[Tensor], Tensor],
) -> list[PendingLogprobs]:
    """Each request's next `counts[r]` scores behind each other, and note that it has them."""
    targets: list[int] = []
    num_top: list[int] = []
    for request, count in zip(requests, counts, strict=True):
        first = request.num_scored_tokens
        targets += request.token_ids[first : first + count].tolist()
        num_top += [request.sampling.prompt_logprobs or 0] * count
        request.num_scored_tokens += count
    parts: list[PendingLogprobs] = []
    for begin in range(0, len(rows), ROWS_AT_ONCE):
        places = slice(begin, begin + ROWS_AT_ONCE)
        logits = compute_logits(hidden[to_device(rows[places], hidden.device)])
        parts.append(PendingLogprobs(logits, targets[places], num_top[places]))
    return parts
