"""Log probabilities of the model's own distribution, before anything that sampling does to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Final

import numpy as np
import torch
from torch import Tensor

from executor_service.engine.messages import TokenLogprobs
from executor_service.engine.request import Request
from executor_service.engine.scheduler import ScheduledRequest

ROWS_AT_ONCE: Final = 64
"""Prompt positions whose logits exist at the same time, so that a long prompt needs no more memory than a short one."""

PromptLogprobs = tuple[Request, list[TokenLogprobs]]
"""A request and the log probabilities of its next prompt tokens."""


def token_logprobs(logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
    """The log probability of one token per row of logits [R, vocabulary], and of its row's `num_top` likeliest tokens.

    Computed in float64. A token id without a logit (placeholders of some families) has the log probability -inf.
    """
    vocabulary = logits.shape[-1]
    logprobs = logits.to(torch.float64).log_softmax(dim=-1)
    ids = torch.tensor(token_ids, device=logits.device)
    gathered = logprobs.gather(-1, ids.clamp(max=vocabulary - 1)[:, None]).squeeze(-1)
    chosen: list[float] = gathered.masked_fill(ids >= vocabulary, float("-inf")).tolist()
    values, indices = (part.tolist() for part in logprobs.topk(min(max(num_top), vocabulary), dim=-1))
    return [
        TokenLogprobs(token_id, chosen[row], tuple(zip(indices[row][:count], values[row][:count], strict=True)))
        for row, (token_id, count) in enumerate(zip(token_ids, num_top, strict=True))
    ]


def prompt_logprobs(
    batch: Sequence[ScheduledRequest], hidden: Tensor, ends: np.ndarray, compute_logits: Callable[[Tensor], Tensor]
) -> list[PromptLogprobs]:
    """For the requests that ask: what this step's chunks say of the prompt tokens that follow them.

    `hidden` [T, width] of the flattened batch, `ends` [R] where each request ends in it. Position i tells of token
    i + 1. What was given before a preemption is not given again.
    """
    asking = [row for row, scheduled in enumerate(batch) if scheduled.request.scores_prompt]
    if not asking:
        return []
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
    scores = _score(requests, counts, np.concatenate(rows), hidden, compute_logits)
    return [(request, score) for request, score in zip(requests, scores, strict=True) if score]


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
) -> list[list[TokenLogprobs]]:
    """Each request's next `counts[r]` scores, and note that it has them."""
    targets: list[int] = []
    num_top: list[int] = []
    for request, count in zip(requests, counts, strict=True):
        first = request.num_scored_tokens
        targets += request.token_ids[first : first + count].tolist()
        num_top += [request.sampling.prompt_logprobs or 0] * count
        request.num_scored_tokens += count
    scores: list[TokenLogprobs] = []
    for begin in range(0, len(rows), ROWS_AT_ONCE):
        places = slice(begin, begin + ROWS_AT_ONCE)
        logits = compute_logits(hidden[torch.from_numpy(rows[places]).to(hidden.device)])
        scores += token_logprobs(logits, targets[places], num_top[places])
    bounds = np.cumsum([0, *counts])
    return [scores[begin:end] for begin, end in pairwise(bounds)]
