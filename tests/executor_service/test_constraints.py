"""Bad words and minimum lengths against transformers' processors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinNewTokensLengthLogitsProcessor, NoBadWordsLogitsProcessor

from executor_service.engine.constraints import BadWords, TokenConstraints
from executor_service.engine.messages import SamplingParams
from executor_service.engine.request import Request
from executor_service.engine.sampling_slots import SamplingSlots
from executor_service.kernels.sample import adjust

VOCABULARY = 6
ids = st.integers(0, VOCABULARY - 1)
NONE = np.empty(0, dtype=np.int64)


@settings(max_examples=200)
@given(words=st.lists(st.lists(ids, min_size=1, max_size=4), min_size=1, max_size=8), output=st.lists(ids, max_size=8))
def test_bad_words_equal_transformers(words: list[list[int]], output: list[int]) -> None:
    """A vocabulary of six makes matches likely. transformers is shown the output alone: a word may begin before it."""
    scores = NoBadWordsLogitsProcessor(words)(torch.tensor([output], dtype=torch.int64), torch.zeros(1, VOCABULARY))
    found = BadWords(tuple(map(tuple, words))).completing(np.array(output, dtype=np.int64))
    assert sorted({int(token) for part in found for token in part}) == scores[0].isinf().nonzero()[:, 0].tolist()


@settings(max_examples=50)
@given(
    count=st.integers(0, 6), min_tokens=st.integers(0, 6), eos=st.sets(ids, min_size=1, max_size=3), stop=st.sets(ids)
)
def test_min_tokens_equals_transformers(count: int, min_tokens: int, eos: set[int], stop: set[int]) -> None:
    processor = MinNewTokensLengthLogitsProcessor(2, min_tokens, sorted(eos | stop))
    scores = processor(torch.zeros(1, 2 + count, dtype=torch.int64), torch.zeros(1, VOCABULARY))
    sampling = SamplingParams(10, min_tokens=min_tokens, stop_token_ids=frozenset(stop))
    request = Request(1, [0, 0], [], sampling, 100, output_token_ids=[0] * count)
    slots = SamplingSlots(torch.device("cpu"), 1, VOCABULARY, frozenset(eos))
    slots.prepare([request])
    zeros, slot, number = torch.zeros(1, VOCABULARY), torch.tensor([0]), torch.tensor([request.num_expected_tokens])
    assert torch.equal(adjust(zeros, slot, number, slots.tables), scores.to(torch.float64))


def test_a_request_without_constraints_bans_nothing() -> None:
    constraints = TokenConstraints(SamplingParams(1))
    assert len(constraints.bias_token_ids) == len(constraints.banned(np.arange(9))) == 0
    assert len(constraints.held_back(np.array([2]))) == 0
    assert not constraints.has_sequences
    assert BadWords(()).completing(NONE) == []


@pytest.mark.parametrize(("words", "expected"), [((), False), (((3,), (4,)), False), (((3,), (4, 5)), True)])
def test_only_words_of_several_tokens_look_at_the_output(words: tuple, expected: bool) -> None:
    assert TokenConstraints(SamplingParams(1, bad_words=words)).has_sequences is expected
