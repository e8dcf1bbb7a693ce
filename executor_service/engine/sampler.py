"""From logits to tokens: greedy or by temperature, top-k and top-p, with reproducible randomness.

A row's random number depends on its request's seed and position alone (Philox 4x32-10, Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011), so a seeded answer is the same in every batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from executor_service.engine.messages import SamplingParams, TokenLogprobs

_MULTIPLIERS: Final = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL: Final = (0x9E3779B9, 0xBB67AE85)
_LOW: Final = np.uint64(0xFFFFFFFF)
_SHIFT: Final = np.uint64(32)


@dataclass(frozen=True)
class SampledTokens:
    """`token_ids` [R] and, where asked for, each row's log probabilities."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


def sample(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> SampledTokens:
    """Logits [R, vocabulary] -> tokens. `positions[r]` counts the tokens before the sampled one."""
    tokens = logits.argmax(dim=-1)
    rows = [row for row, param in enumerate(params) if param.temperature > 0]
    if rows:
        chosen = [params[row] for row in rows]
        uniforms = uniform_numbers([param.seed for param in chosen], [positions[row] for row in rows])
        tokens[rows] = _draw(logits[rows], chosen, torch.from_numpy(uniforms).to(logits.device))
    token_ids: list[int] = tokens.tolist()
    return SampledTokens(token_ids, _logprobs(logits, params, token_ids))


def uniform_numbers(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """One number in [0, 1) per (64-bit seed, position): float64 [R], 53 random bits each."""
    key = np.asarray(seeds, dtype=np.uint64)
    counter = np.asarray(positions, dtype=np.uint64)
    words = _philox(counter, key)
    high, low = words[0], words[1]
    bits = ((high << _SHIFT) | low) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def _philox(counter: np.ndarray, key: np.ndarray) -> list[np.ndarray]:
    """Ten rounds on the counter (c0, c1 from `counter`; c2, c3 zero); four 32-bit words as uint64."""
    zeros = np.zeros_like(counter)
    c0, c1, c2, c3 = counter & _LOW, counter >> _SHIFT, zeros, zeros
    k0, k1 = key & _LOW, key >> _SHIFT
    for _ in range(10):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + np.uint64(_WEYL[0])) & _LOW, (k1 + np.uint64(_WEYL[1])) & _LOW
    return [c0, c1, c2, c3]


def _draw(logits: Tensor, params: Sequence[SamplingParams], uniforms: Tensor) -> Tensor:
    """Inverse transform sampling in float64 over the kept tokens, in token order."""
    probabilities = filtered_probabilities(logits, params)
    cumulative = probabilities.cumsum(dim=-1)
    targets = uniforms[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, targets, right=True).squeeze(-1)
    # Rounding may put the target at the very end, behind the last token that has any probability.
    last = logits.shape[-1] - 1 - (probabilities > 0).to(torch.uint8).flip(-1).argmax(dim=-1)
    return torch.minimum(tokens, last)


def filtered_probabilities(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The distribution each row is sampled from: float64 [R, vocabulary], temperature, then top-k, then top-p."""
    temperatures = torch.tensor([param.temperature for param in params], dtype=torch.float64, device=logits.device)
    scaled = logits.to(torch.float64) / temperatures[:, None]
    if any(param.top_k or param.top_p < 1 for param in params):
        scaled = _filter(scaled, params)
    return scaled.softmax(dim=-1)


def _filter(scaled: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Mask what top-k and top-p leave out with -inf; equal logits count in token order."""
    vocabulary = scaled.shape[-1]
    top_k = torch.tensor([param.top_k or vocabulary for param in params], device=scaled.device)
    # A top_p of 1 keeps everything, also what rounding puts behind a cumulative probability of 1.
    bounds = [param.top_p if param.top_p < 1 else 2.0 for param in params]
    top_p = torch.tensor(bounds, dtype=torch.float64, device=scaled.device)
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    ordered.masked_fill_(torch.arange(vocabulary, device=scaled.device) >= top_k[:, None], float("-inf"))
    before = ordered.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
    before[:, 0] = 0.0
    ordered.masked_fill_((before >= top_p[:, None]) & (before > 0), float("-inf"))
    return torch.full_like(scaled, float("-inf")).scatter_(-1, order, ordered)


def _logprobs(logits: Tensor, params: Sequence[SamplingParams], token_ids: list[int]) -> list[TokenLogprobs | None]:
    """Of the model's own distribution, in float64, for the rows that ask."""
    result: list[TokenLogprobs | None] = [None] * len(params)
    rows = [row for row, param in enumerate(params) if param.logprobs is not None]
    if not rows:
        return result
    logprobs = logits[rows].to(torch.float64).log_softmax(dim=-1)
    most = max(params[row].logprobs or 0 for row in rows)
    values, indices = (part.tolist() for part in logprobs.topk(min(most, logits.shape[-1]), dim=-1))
    for place, row in enumerate(rows):
        count = params[row].logprobs or 0
        top = tuple(zip(indices[place][:count], values[place][:count], strict=True))
        result[row] = TokenLogprobs(token_ids[row], float(logprobs[place, token_ids[row]]), top)
    return result
