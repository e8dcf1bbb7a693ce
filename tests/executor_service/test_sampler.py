"""The sampler as a whole: against transformers, against the exact distribution, and for reproducibility."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from executor_service.engine.messages import SamplingParams
from executor_service.engine.request import Request
from executor_service.engine.sampler import SampledTokens, Sampler
from executor_service.engine.sampling_slots import SamplingSlots
from executor_service.kernels import sample as sample_op
from executor_service.kernels.logits import Filters, filtered_probabilities
from executor_service.kernels.random_numbers import philox, uniform_numbers

VOCABULARY = 50
EOS = 2
CPU = torch.device("cpu")


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


def params(**values) -> SamplingParams:
    return SamplingParams(max_tokens=1 << 14, **values)


def request(number: int, config: SamplingParams, prompt: list[int], output: list[int] | None = None) -> Request:
    made = Request(number, prompt, [], config, 1 << 15)
    for token in output or []:
        made.append(token, frozenset())
    return made


def sample(rows: torch.Tensor, configs: list[SamplingParams], positions: list[int]) -> SampledTokens:
    """Prompts of as many tokens as the positions say."""
    requests = [request(n, c, [0] * p) for n, (c, p) in enumerate(zip(configs, positions, strict=True))]
    return Sampler(CPU, len(rows), VOCABULARY).sample(rows, requests).result()


def test_philox_equals_the_published_vectors() -> None:
    """Known answers of Random123 for philox4x32-10."""
    zero = np.zeros(1, dtype=np.uint64)
    assert [int(word[0]) for word in philox(zero, zero)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_uniform_numbers_differ_by_seed_and_position() -> None:
    numbers = uniform_numbers([s for s in range(100) for _ in range(100)], list(range(100)) * 100)
    assert len(np.unique(numbers)) == 10_000
    assert 0 <= numbers.min() < 0.001
    assert 0.999 < numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.01


def test_greedy_is_the_argmax() -> None:
    rows = logits(7)
    assert sample(rows, [params(temperature=0.0)] * 7, [1] * 7).token_ids == rows.argmax(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_of_equal_logits_the_first_is_greedy(dtype: torch.dtype) -> None:
    rows = torch.zeros(3, VOCABULARY, dtype=dtype)
    rows[0, [7, 9, 49]] = rows[1, [0, 49]] = 1.0
    assert sample(rows, [params(temperature=0.0)] * 3, [1] * 3).token_ids == [7, 0, 0]


# --- everything at once -----------------------------------------------------------------------------

PROMPT, OUTPUT = [1, 7, 7, 9, 30, 31], [5, 9, 5, 12, 40]
ALL = {
    "repetition_penalty": 1.7,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.3,
    "logit_bias": ((3, 2.5), (9, 4.0), (44, -30.0)),
    "min_tokens": 8,
    "stop_token_ids": frozenset({17}),
    "bad_words": ((22,), (12, 40, 23), (40, 24), (39, 25)),
}


def reference(row: torch.Tensor) -> torch.Tensor:
    """One row as transformers' processors make it, [1, vocabulary]; presence and frequency, which it lacks, by hand."""
    scores = row.double()[None]
    tokens, output = torch.tensor([PROMPT + OUTPUT]), torch.tensor([OUTPUT])
    scores = SequenceBiasLogitsProcessor([[[token], value] for token, value in ALL["logit_bias"]])(tokens, scores)
    scores = RepetitionPenaltyLogitsProcessor(ALL["repetition_penalty"])(tokens, scores)
    for token in OUTPUT:
        scores[0, token] -= ALL["frequency_penalty"]
    for token in set(OUTPUT):
        scores[0, token] -= ALL["presence_penalty"]
    scores = NoBadWordsLogitsProcessor([list(word) for word in ALL["bad_words"]])(output, scores)
    return MinNewTokensLengthLogitsProcessor(len(PROMPT), ALL["min_tokens"], [EOS, 17])(tokens, scores)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1))
def test_all_constraints_equal_transformers(seed: int) -> None:
    rows = logits(4, seed)
    batch = [
        request(0, params(temperature=0.0), PROMPT, OUTPUT),
        request(1, params(temperature=0.0, **ALL), PROMPT, OUTPUT),
        request(2, params(temperature=1.0), [1]),
        request(3, params(temperature=0.0, **ALL), PROMPT, OUTPUT),
    ]
    sampler = Sampler(CPU, 4, VOCABULARY, frozenset({EOS}))
    slots = torch.tensor(sampler.slots.prepare(batch))
    numbers = torch.tensor([one.num_tokens for one in batch])
    adjusted = sample_op.adjust(rows, slots, numbers, sampler.slots.tables)
    for row in (1, 3):
        torch.testing.assert_close(adjusted[row : row + 1], reference(rows[row]), atol=1e-6, rtol=1e-6)
    assert torch.equal(adjusted[[0, 2]], rows[[0, 2]].double())
    tokens = sampler.sample(rows, batch).result().token_ids
    assert tokens[0] == rows[0].argmax()
    assert [tokens[1], tokens[3]] == [int(reference(rows[row]).argmax()) for row in (1, 3)]


def test_samples_follow_the_distribution() -> None:
    """Chi-square of 20,000 draws with every constraint and filter against transformers; the 99.99 % quantile."""
    row, draws = logits(1, seed=3), 20_000
    filters = {"temperature": 1.6, "min_p": 0.02, "top_k": 20, "top_p": 0.97}
    warpers = LogitsProcessorList([
        TemperatureLogitsWarper(1.6), MinPLogitsWarper(0.02), TopKLogitsWarper(20), TopPLogitsWarper(0.97)
    ])  # fmt: skip
    expected = warpers(None, reference(row[0])).softmax(-1)[0].numpy() * draws
    sampler = Sampler(CPU, 1000, VOCABULARY, frozenset({EOS}))
    counts = np.zeros(VOCABULARY)
    for first in range(0, draws, 1000):
        batch = [request(n, params(seed=first + n, **filters, **ALL), PROMPT, OUTPUT) for n in range(1000)]
        tokens = sampler.sample(row.expand(1000, -1), batch).result().token_ids
        counts += np.bincount(tokens, minlength=VOCABULARY)
        for one in batch:
            sampler.release(one.request_id)
    check_chi_square(counts, expected)


def test_successive_positions_follow_the_distribution() -> None:
    row, draws = logits(1, seed=5), 10_000
    config = params(temperature=1.3, top_k=12, top_p=0.95, seed=11)
    values = torch.tensor([[1.3], [0.0], [0.95]], dtype=torch.float64)
    expected = filtered_probabilities(row, Filters(*values, top_k=torch.tensor([12])))[0].numpy() * draws
    tokens = sample(row.expand(draws, -1), [config] * draws, [position % 16_000 + 1 for position in range(draws)])
    check_chi_square(np.bincount(tokens.token_ids, minlength=VOCABULARY), expected)


def check_chi_square(counts: np.ndarray, expected: np.ndarray) -> None:
    kept = expected > 0
    assert kept.sum() > 5
    assert counts[~kept].sum() == 0
    chi_square = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom) + 12


# --- batches ----------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(data=st.data())
def test_tokens_do_not_depend_on_the_batch(data: st.DataObject) -> None:
    """Rows with all kinds of parameters: in any order and any company, each gets the token it gets alone."""
    kinds = [
        {}, {"temperature": 0.0}, {"top_p": 0.8}, {"min_p": 0.2, "top_k": 7}, ALL, {"temperature": 0.0, **ALL},
        {"repetition_penalty": 0.5}, {"logit_bias": ((4, 3.0),)}, {"bad_words": ((12, 40, 8), (3,))},
    ]  # fmt: skip
    configs = [params(seed=data.draw(st.integers(0, 2**64 - 1)), **kind) for kind in kinds]
    rows = logits(len(configs), data.draw(st.integers(0, 1000)))
    batch = [request(number, config, PROMPT[: 1 + number % 6], OUTPUT) for number, config in enumerate(configs)]
    alone = [draw_alone(rows[n : n + 1], one) for n, one in enumerate(batch)]
    order = data.draw(st.permutations(range(len(batch))))[: data.draw(st.integers(1, len(batch)))]
    together = Sampler(CPU, len(order), VOCABULARY).sample(rows[order], [batch[n] for n in order]).result()
    assert together.token_ids == [alone[n] for n in order]


def draw_alone(row: torch.Tensor, one: Request) -> int:
    return Sampler(CPU, 1, VOCABULARY).sample(row, [one]).result().token_ids[0]


def test_plain_rows_are_not_looked_at(monkeypatch) -> None:
    """Requests without constraints pay for none, not even where neighbours have them."""
    sampler = Sampler(CPU, 6, VOCABULARY)
    seen = []
    adjust = sample_op.adjust
    monkeypatch.setattr(sample_op, "adjust", lambda rows, *others: seen.append(len(rows)) or adjust(rows, *others))
    plain = [request(n, params(temperature=float(n % 2), top_p=0.9), PROMPT, OUTPUT) for n in range(4)]
    sampler.sample(logits(4), plain)
    neutral = request(4, params(repetition_penalty=1.0, presence_penalty=0.0, min_tokens=5), PROMPT, OUTPUT)
    sampler.sample(logits(5), [*plain, neutral])
    assert seen == []
    sampler.sample(logits(6), [*plain, neutral, request(5, params(frequency_penalty=0.1), PROMPT)])
    assert seen == [1]


# --- tokens that only the device knows ------------------------------------------------------------------


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1))
def test_tokens_in_flight_count(seed: int) -> None:
    """Step after step without telling the host equals a host that appends every token at once."""
    kinds = [
        {"presence_penalty": 2.0, "repetition_penalty": 1.5}, {"frequency_penalty": 1.0, "min_tokens": 7}, {},
        {"temperature": 0.0, "frequency_penalty": 2.0, "stop_token_ids": frozenset({17}), "min_tokens": 9},
    ]  # fmt: skip
    told, untold = ([request(n, params(seed=n, **kind), PROMPT, OUTPUT) for n, kind in enumerate(kinds)] for _ in "ab")
    samplers = [Sampler(CPU, 4, VOCABULARY, frozenset({EOS})) for _ in "ab"]
    for step in range(6):
        rows = logits(4, seed + step)
        expected = samplers[0].sample(rows, told).result().token_ids
        pending = samplers[1].sample(rows, untold)
        assert pending.token_ids.tolist() == expected
        for token, one, other in zip(expected, told, untold, strict=True):
            one.append(token, frozenset())
            other.num_inflight_tokens += 1


def test_a_request_that_lost_its_slot_is_counted_again() -> None:
    config = params(temperature=0.0, presence_penalty=100.0)
    row = logits(1)
    sampler = Sampler(CPU, 1, VOCABULARY)
    first, second = request(1, config, PROMPT), request(2, config, PROMPT)
    tokens = []
    for _ in range(4):
        tokens.append(sampler.sample(row, [first]).result().token_ids[0])
        first.append(tokens[-1], frozenset())
        sampler.sample(row, [second])
    assert tokens == row[0].topk(4).indices.tolist(), "each token is chosen once"
    assert len(sampler.slots) == 1


def test_a_row_that_is_nobodys_is_skipped() -> None:
    sampler = Sampler(CPU, 2, VOCABULARY)
    one = request(1, params(temperature=0.0, presence_penalty=1.0), PROMPT, OUTPUT)
    (slot,) = sampler.slots.prepare([one])
    before = sampler.slots.tables.output_counts.clone()
    rows = logits(3)
    sampled = sample_op.sample(rows, torch.tensor([-1, -1, -1]), torch.tensor([5, 0, 7]), sampler.slots.tables)
    assert sampled.token_ids.tolist() == [0, 0, 0]
    assert torch.equal(before, sampler.slots.tables.output_counts)
    sampled = sample_op.sample(rows, torch.tensor([-1, slot, -1]), torch.tensor([5, 11, 7]), sampler.slots.tables)
    assert sampled.token_ids[[0, 2]].tolist() == [0, 0]
    assert (before != sampler.slots.tables.output_counts).sum() == 1


# --- log probabilities --------------------------------------------------------------------------------


def test_logprobs_are_of_the_models_own_distribution() -> None:
    """Before temperature, filters, penalties, biases and bans."""
    rows = logits(3)
    configs = [params(temperature=0.0, logprobs=3), params(), params(temperature=2.0, top_k=2, logprobs=5, **ALL)]
    batch = [request(n, config, PROMPT, OUTPUT) for n, config in enumerate(configs)]
    result = Sampler(CPU, 3, VOCABULARY).sample(rows, batch).result()
    assert result.logprobs[1] is None
    for row, count in ((0, 3), (2, 5)):
        entry, expected = result.logprobs[row], rows[row].double().log_softmax(-1)
        assert entry.token_id == result.token_ids[row]
        assert entry.logprob == pytest.approx(float(expected[entry.token_id]), abs=1e-12)
        assert [token for token, _ in entry.top] == expected.topk(count).indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(expected.topk(count).values.tolist(), abs=1e-12)


def test_logprobs_zero_gives_the_chosen_token_alone() -> None:
    entry = sample(logits(1), [params(temperature=0.0, logprobs=0)], [1]).logprobs[0]
    assert entry is not None
    assert entry.top == ()


def test_the_op_is_what_its_schema_says() -> None:
    batch = [request(n, params(seed=n, logprobs=20, **kind), PROMPT, OUTPUT) for n, kind in enumerate(({}, ALL))]
    sampler = Sampler(CPU, 3, VOCABULARY, frozenset({EOS}))
    slots = torch.tensor(sampler.slots.prepare(batch))
    for order in (None, torch.tensor([1, 0])):
        arguments = (logits(2), slots, torch.tensor([11, 11]), order, *sampler.slots.tables)
        torch.library.opcheck(torch.ops.diptych.sample.default, arguments)


def test_rows_begin_with_the_longest() -> None:
    """Where there are more than begin at once and they differ; rows that cost the same stay in their order."""
    slots = SamplingSlots(CPU, 8, VOCABULARY)
    configs = [params(temperature=0.0), params(top_p=0.5), params(temperature=0.0, logprobs=3), params(top_k=5),
               params(temperature=0.0), params(top_k=1000, top_p=0.5, presence_penalty=1.0), params()]  # fmt: skip
    taken = slots.prepare([request(n, config, [1]) for n, config in enumerate(configs)])
    order = slots.order(taken, 6)
    assert order is not None
    assert order.tolist() == [5, 1, 3, 2, 6, 0, 4]
    assert slots.order(taken, 7) is None
    assert slots.order([taken[0], taken[4]], 1) is None
