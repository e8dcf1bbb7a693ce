"""The arithmetic of sampling as functions of tensors: penalties, biases, bans, filters, the draw.

Rows are requests, columns the vocabulary. Everything is float64: conversion from the model's dtype is exact, so
what these functions decide depends on the row alone. They are the reference of the op in `sample.py`.

The order there: logit bias, penalties, bans; temperature, min-p, top-k, top-p; the draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NEVER = float("-inf")


@dataclass(frozen=True)
class Penalties:
    """One value per row, float64 [R]; 1, 0 and 0 change nothing."""

    repetition: Tensor
    presence: Tensor
    frequency: Tensor


@dataclass(frozen=True)
class Filters:
    """One value per row: float64 [R], `top_k` int64 [R].

    Neutral are 1 for temperature and `top_p`, 0 for `min_p` and `top_k`.
    """

    temperature: Tensor
    min_p: Tensor
    top_p: Tensor
    top_k: Tensor


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
    if filters.min_p.any():
        relative = (scaled - scaled.amax(dim=-1, keepdim=True)).exp_()
        scaled.masked_fill_(relative < filters.min_p[:, None], NEVER)
    rows = ((filters.top_k > 0) | (filters.top_p < 1)).nonzero().squeeze(-1)
    if len(rows):
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
