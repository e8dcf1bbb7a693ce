"""Sampling against transformers' warpers, against the exact distribution, and for reproducibility."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from executor_service.engine.messages import SamplingParams
from executor_service.engine.sampler import _philox, filtered_probabilities, sample, uniform_numbers

VOCABULARY = 50


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


def params(**values) -> SamplingParams:
    return SamplingParams(max_tokens=1, **values)


def test_philox_equals_the_published_vectors() -> None:
    """Known answers of Random123 for philox4x32-10."""
    zero = np.zeros(1, dtype=np.uint64)
    assert [int(word[0]) for word in _philox(zero, zero)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [
    (1.0, 0, 1.0), (0.3, 0, 1.0), (1.5, 5, 1.0), (1.0, 0, 0.7), (0.8, 10, 0.5), (1.0, 1, 1.0), (2.0, 0, 0.01),
    (1.0, 1000, 0.999),
])  # fmt: skip
def test_distribution_equals_transformers(temperature: float, top_k: int, top_p: float) -> None:
    rows = logits(4)
    expected = TemperatureLogitsWarper(temperature)(None, rows.double())
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    got = filtered_probabilities(rows, [params(temperature=temperature, top_k=top_k, top_p=top_p)] * 4)
    torch.testing.assert_close(got, expected.softmax(-1), atol=1e-12, rtol=1e-9)


def test_rows_with_different_parameters_do_not_mix() -> None:
    rows = logits(3)
    mixed = [params(temperature=0.5, top_k=3), params(temperature=2.0), params(temperature=1.0, top_p=0.4)]
    together = filtered_probabilities(rows, mixed)
    for index, one in enumerate(mixed):
        torch.testing.assert_close(together[index : index + 1], filtered_probabilities(rows[index : index + 1], [one]))


def test_greedy_is_the_argmax() -> None:
    rows = logits(7)
    assert sample(rows, [params(temperature=0.0)] * 7, [0] * 7).token_ids == rows.argmax(-1).tolist()


def test_samples_follow_the_distribution() -> None:
    """Chi-square over 20,000 draws at successive positions; the bound is the 99.99 % quantile."""
    row, draws = logits(1, seed=3), 20_000
    config = params(temperature=1.3, top_k=12, top_p=0.95, seed=11)
    expected = filtered_probabilities(row, [config])[0].numpy() * draws
    tokens = sample(row.expand(draws, -1), [config] * draws, list(range(draws))).token_ids
    counts = np.bincount(tokens, minlength=VOCABULARY)
    kept = expected > 0
    assert counts[~kept].sum() == 0
    chi_square = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom) + 12


def test_seeded_tokens_do_not_depend_on_the_batch() -> None:
    rows = logits(6)
    configs = [params(temperature=1.0, seed=seed) for seed in (5, 5, 7, 2**64 - 1, 0, 5)]
    together = sample(rows, configs, [3, 4, 3, 3, 3, 3]).token_ids
    alone = [sample(rows[i : i + 1], [configs[i]], [[3, 4, 3, 3, 3, 3][i]]).token_ids[0] for i in range(6)]
    assert together == alone


def test_uniform_numbers_differ_by_seed_and_position() -> None:
    numbers = uniform_numbers([s for s in range(100) for _ in range(100)], list(range(100)) * 100)
    assert len(np.unique(numbers)) == 10_000
    assert 0 <= numbers.min() < 0.001
    assert 0.999 < numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.01


def test_logprobs_are_of_the_models_own_distribution() -> None:
    rows = logits(2)
    result = sample(rows, [params(temperature=0.0, logprobs=3), params(temperature=0.0)], [0, 0])
    entry = result.logprobs[0]
    expected = rows[0].double().log_softmax(-1)
    assert result.logprobs[1] is None
    assert entry.logprob == pytest.approx(float(expected[entry.token_id]))
    assert [token for token, _ in entry.top] == expected.topk(3).indices.tolist()


def test_logprobs_zero_gives_the_chosen_token_alone() -> None:
    entry = sample(logits(1), [params(temperature=0.0, logprobs=0)], [0]).logprobs[0]
    assert entry is not None
    assert entry.top == ()
