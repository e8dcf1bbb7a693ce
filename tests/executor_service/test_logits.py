"""The arithmetic of sampling against transformers' processors and float64 numpy, over random parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from executor_service.engine.messages import SamplingParams
from executor_service.kernels.logits import Filters, Penalties, add_bias, ban, draw, filtered_probabilities, penalize

VOCABULARY = 50
ids = st.integers(0, VOCABULARY - 1)
seeds = st.integers(0, 2**32 - 1)


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def params(**values) -> SamplingParams:
    return SamplingParams(max_tokens=1, **values)


def probabilities(rows: torch.Tensor, configs: list[SamplingParams]) -> torch.Tensor:
    top_k = torch.tensor([config.top_k for config in configs])
    table = torch.tensor([(p.temperature, p.min_p, p.top_p) for p in configs], dtype=torch.float64)
    return filtered_probabilities(rows, Filters(*table.unbind(-1), top_k=top_k))


def penalties(repetition: float, presence: float, frequency: float, rows: int = 1) -> Penalties:
    return Penalties(*torch.tensor([[repetition, presence, frequency]] * rows, dtype=torch.float64).unbind(-1))


def counted(prompts: list[list[int]], outputs: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    seen = torch.tensor(np.array([np.bincount(prompt, minlength=VOCABULARY) > 0 for prompt in prompts]))
    counts = torch.tensor(np.array([np.bincount(np.array(o, dtype=int), minlength=VOCABULARY) for o in outputs]))
    return seen, counts


@settings(max_examples=80)
@given(
    prompts=st.lists(st.lists(ids, min_size=1, max_size=30), min_size=1, max_size=4),
    output=st.lists(ids, max_size=20),
    penalty=st.floats(0.05, 20),
    seed=seeds,
)
def test_repetition_equals_transformers(prompts: list[list[int]], output: list[int], penalty: float, seed: int) -> None:
    rows = logits(len(prompts), seed)
    seen, counts = counted(prompts, [output] * len(prompts))
    got = penalize(rows, seen, counts, penalties(penalty, 0.0, 0.0, len(prompts)))
    for row, prompt in enumerate(prompts):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output]), rows[row : row + 1])
        torch.testing.assert_close(got[row : row + 1], expected, atol=0, rtol=1e-15)


@settings(max_examples=80)
@given(
    prompt=st.lists(ids, min_size=1, max_size=30),
    output=st.lists(ids, max_size=40),
    repetition=st.floats(0.1, 10),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    seed=seeds,
)
def test_penalties_equal_a_loop_over_tokens(
    prompt: list[int], output: list[int], repetition: float, presence: float, frequency: float, seed: int
) -> None:
    """Presence and frequency are of the output alone; the prompt counts for repetition only."""
    rows = logits(1, seed)
    expected = rows[0].numpy().copy()
    for token in set(prompt) | set(output):
        expected[token] = expected[token] / repetition if expected[token] > 0 else expected[token] * repetition
    for token in output:
        expected[token] -= frequency
    for token in set(output):
        expected[token] -= presence
    got = penalize(rows, *counted([prompt], [output]), penalties(repetition, presence, frequency))
    np.testing.assert_allclose(got[0].numpy(), expected, atol=1e-12)


@settings(max_examples=50)
@given(bias=st.dictionaries(ids, st.floats(-100, 100), min_size=1, max_size=20), seed=seeds)
def test_bias_equals_transformers(bias: dict[int, float], seed: int) -> None:
    rows = logits(2, seed)
    got = rows.clone()
    values = torch.tensor(list(bias.values()), dtype=torch.float64)
    add_bias(got, torch.ones(len(bias), dtype=torch.int64), torch.tensor(list(bias)), values)
    expected = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])(
        torch.tensor([[0]]), rows[1:]
    )
    torch.testing.assert_close(got[1:], expected, atol=1e-5, rtol=1e-6)  # transformers keeps biases in float32
    assert torch.equal(got[0], rows[0])


def test_ids_without_a_logit_are_left_out() -> None:
    rows = logits(1)
    got = rows.clone()
    places = torch.zeros(2, dtype=torch.int64), torch.tensor([3, VOCABULARY + 7])
    add_bias(got, *places, torch.ones(2, dtype=torch.float64))
    assert got[0, 3] == rows[0, 3] + 1
    ban(got, *places)
    assert (got == -torch.inf).sum() == 1


@settings(max_examples=150)
@given(
    temperature=st.floats(0.05, 5),
    min_p=st.floats(0, 1),
    top_k=st.integers(0, VOCABULARY + 10),
    top_p=st.floats(0.01, 1),
    seed=seeds,
)
def test_filters_equal_transformers(temperature: float, min_p: float, top_k: int, top_p: float, seed: int) -> None:
    """In this project's order: temperature, min-p, top-k, top-p."""
    rows = logits(3, seed)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature), MinPLogitsWarper(min_p)])
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    got = probabilities(rows, [params(temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p)] * 3)
    torch.testing.assert_close(got, warpers(None, rows).softmax(-1), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("values", [
    {"temperature": 0.3}, {"temperature": 1.5, "top_k": 5}, {"top_p": 0.7}, {"top_k": 1}, {"top_p": 0.01},
    {"min_p": 1.0}, {"min_p": 0.05}, {"top_k": 1000, "top_p": 0.999},
])  # fmt: skip
def test_rows_with_different_parameters_do_not_mix(values: dict) -> None:
    rows = logits(3)
    mixed = [params(**values), params(temperature=2.0), params(top_p=0.4, min_p=0.2)]
    together = probabilities(rows, mixed)
    for index, one in enumerate(mixed):
        torch.testing.assert_close(together[index : index + 1], probabilities(rows[index : index + 1], [one]))


def test_the_order_of_the_filters() -> None:
    """min-p before top-p: what it leaves out has no share in top-p's sum."""
    row = torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.1]], dtype=torch.float64).log()
    # Of 0.5 and 0.2 alone the first is 71 %; of all five it is 50 %.
    assert probabilities(row, [params(min_p=0.3, top_p=0.69)])[0].tolist() == [1, 0, 0, 0, 0]
    assert (probabilities(row, [params(top_p=0.69)])[0] > 0).tolist() == [True, True, False, False, False]
    # The temperature comes first: hotter, 0.2 of the likeliest is reached by all.
    assert (probabilities(row, [params(min_p=0.4)])[0] > 0).sum() == 2
    assert (probabilities(row, [params(min_p=0.4, temperature=2.0)])[0] > 0).sum() == 5


def test_a_draw_never_leaves_what_has_probability() -> None:
    row = torch.tensor([[0.0, 0.5, 0.5, 0.0]], dtype=torch.float64)
    for uniform, token in ((0.0, 1), (0.49, 1), (0.5, 2), (1 - 2**-53, 2)):
        assert draw(row, torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]
