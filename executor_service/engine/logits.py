"""The arithmetic of sampling as functions of tensors: penalties, biases, bans, filters, the draw.

Rows are requests, columns the vocabulary. Everything is float64: conversion from the model's dtype is exact, so
what these functions decide depends on the row alone. They are the reference for any faster implementation.

The order, as in `sampler.py`: logit bias, penalties, bans; temperature, min-p, top-k, top-p; the draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from executor_service.engine.messages import SamplingParams

NEVER = float("-inf")


@dataclass(frozen=True)
class Penalties:
    """One value per row, float64 [R]; 1, 0 and 0 change nothing."""

    repetition: Tensor
    presence: Tensor
    frequency: Tensor

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device) -> Penalties:
        """The rows' values, on the device."""
        table = [(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in params]
        return cls(*torch.tensor(table, dtype=torch.float64, device=device).unbind(-1))


@dataclass(frozen=True)
class Filters:
    """One value per row: float64 [R], `top_k` int64 [R].

    Neutral are 1 for temperature and `top_p`, 0 for `min_p` and `top_k`. `ranked` are the rows in which top-k or
    top-p leave anything out, known on the host: only these are sorted.
    """

    temperature: Tensor
    min_p: Tensor
    top_p: Tensor
    top_k: Tensor
    ranked: tuple[int, ...]
    has_min_p: bool

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device) -> Filters:
        """The rows' values, on the device."""
        table = torch.tensor([(p.temperature, p.min_p, p.top_p) for p in params], dtype=torch.float64, device=device)
        temperature, min_p, top_p = table.unbind(-1)
        return cls(
            temperature,
            min_p,
            top_p,
            top_k=torch.tensor([p.top_k for p in params], dtype=torch.int64, device=device),
            ranked=tuple(row for row, p in enumerate(params) if p.top_k or p.top_p < 1),
            has_min_p=any(p.min_p for p in params),
        )


def add_bias(logits: Tensor, rows: Tensor, token_ids: Tensor, values: Tensor) -> None:
    """Add `values` [N] in place at (`rows` [N], `token_ids` [N]); each place once. Ids without a logit are left out."""
    there = token_ids < logits.shape[-1]
    logits[rows[there], token_ids[there]] += values[there]


def ban(logits: Tensor, rows: Tensor, token_ids: Tensor) -> None:
    """Make the tokens at (`rows` [N], `token_ids` [N]) impossible, in place. Ids without a logit are left out."""
    there = token_ids < logits.shape[-1]
    logits[rows[there], token_ids[there]] = NEVER


def penalize(logits: Tensor, prompt_seen: Tensor, output_counts: Tensor, penalties: Penalties) -> Tensor:
    """Logits [R, vocabulary] less likely to repeat: a new tensor.

    `prompt_seen` bool and `output_counts` integer, both [R, vocabulary]. Repetition: positive logits of tokens in
    prompt or output are divided, negative ones multiplied (Keskar et al., "CTRL", 2019, section 4.1, with the sign
    told apart as transformers does). Then presence is subtracted once and frequency per occurrence, of tokens in the
    output alone.
    """
    in_output = output_counts > 0
    repetition = penalties.repetition[:, None]
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    penalized = torch.where(prompt_seen | in_output, repeated, logits)
    penalized -= penalties.frequency[:, None] * output_counts
    return penalized.sub_(penalties.presence[:, None] * in_output)


def filtered_probabilities(logits: Tensor, filters: Filters) -> Tensor:
    """The distribution each row is drawn from, float64 [R, vocabulary]: temperature, min-p, top-k, top-p."""
    scaled = logits.to(torch.float64) / filters.temperature[:, None]
    if filters.has_min_p:
        relative = (scaled - scaled.amax(dim=-1, keepdim=True)).exp_()
        scaled.masked_fill_(relative < filters.min_p[:, None], NEVER)
    if filters.ranked:
        rows = torch.tensor(filters.ranked, device=logits.device)
        scaled[rows] = _keep_best(scaled[rows], filters.top_k[rows], filters.top_p[rows])
    return scaled.softmax(dim=-1)


def _keep_best(scaled: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Mask what top-k and top-p leave out with -inf; equal logits count in token order."""
    vocabulary = scaled.shape[-1]
    most = torch.where(top_k > 0, top_k, vocabulary)
    # A top_p of 1 keeps everything, also what rounding puts behind a cumulative probability of 1.
    mass = torch.where(top_p < 1, top_p, 2.0)
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    ordered.masked_fill_(torch.arange(vocabulary, device=scaled.device) >= most[:, None], NEVER)
    before = ordered.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
    before[:, 0] = 0.0
    ordered.masked_fill_((before >= mass[:, None]) & (before > 0), NEVER)
    return torch.full_like(scaled, NEVER).scatter_(-1, order, ordered)


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse transform sampling over [R, vocabulary] with one number of [0, 1) per row: int64 [R], in token order."""
    cumulative = probabilities.cumsum(dim=-1)
    targets = uniforms[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, targets, right=True).squeeze(-1)
    # Rounding may put the target at the very end, behind the last token that has any probability.
    last = probabilities.shape[-1] - 1 - (probabilities > 0).to(torch.uint8).flip(-1).argmax(dim=-1)
    return torch.minimum(tokens, last)
