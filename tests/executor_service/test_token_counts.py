"""The table of token counts is what the requests' own tokens say, whatever happened in between."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from executor_service.engine.messages import SamplingParams
from executor_service.engine.request import Request
from executor_service.engine.sampler import Sampler
from executor_service.engine.token_counts import TokenCounts

VOCABULARY = 20
NUM_SLOTS = 4
CPU = torch.device("cpu")
PARAMS = SamplingParams(max_tokens=500, ignore_eos=True, repetition_penalty=1.5)


def check(sampler: Sampler, request: Request) -> None:
    """The row of a request that is looked at says what its tokens are."""
    slots, counts = sampler.slots, sampler.slots.counts
    index = slots._slots[request.request_id].index
    prompt = request.token_ids[: request.num_prompt_tokens]
    seen = np.unpackbits(counts.prompt_seen[index].numpy(), bitorder="little")
    assert set(np.flatnonzero(seen)) == {token for token in prompt if token < VOCABULARY}
    expected = np.bincount(request.output_token_ids, minlength=counts.output_counts.shape[-1])
    assert counts.output_counts[index].tolist() == expected.tolist()


@settings(max_examples=60)
@given(st.data())
def test_any_history(data: st.DataObject) -> None:
    """Requests come, get tokens in batches of all sizes, are told of them late, are preempted, leave, come again."""
    sampler = Sampler(CPU, NUM_SLOTS, VOCABULARY)
    live: dict[int, Request] = {}
    for step in range(data.draw(st.integers(1, 25))):
        number = data.draw(st.integers(0, 7))
        action = data.draw(st.sampled_from(["draw", "draw", "draw", "preempt", "leave"]))
        if number not in live:
            # Placeholders of some families are beyond the vocabulary.
            prompt = data.draw(st.lists(st.integers(0, VOCABULARY + 3), min_size=1, max_size=10))
            output = data.draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=5))
            live[number] = Request(number, prompt, [], PARAMS, 1000, output_token_ids=output)
        if action == "draw":
            numbers = data.draw(st.sets(st.sampled_from(sorted(live)), min_size=1, max_size=NUM_SLOTS))
            draw(sampler, [live[other] for other in numbers], step, data.draw(st.integers(1, 3)))
        elif action == "preempt":
            live[number].reset_progress()
        else:
            sampler.release(number)
            del live[number]
        assert len(sampler.slots) <= NUM_SLOTS


def draw(sampler: Sampler, batch: list[Request], seed: int, num_steps: int) -> None:
    """Some tokens for each, which the host learns of only at the end."""
    pending = []
    for _ in range(num_steps):
        rows = torch.randn(len(batch), VOCABULARY, generator=torch.Generator().manual_seed(seed))
        pending.append(sampler.sample(rows, batch))
        for request in batch:
            request.num_inflight_tokens += 1
    for step in pending:
        for request, token in zip(batch, step.result().token_ids, strict=True):
            request.append(token, frozenset())
            request.num_inflight_tokens = 0
    for request in batch:
        check(sampler, request)


def test_only_new_tokens_are_counted() -> None:
    sampler = Sampler(CPU, 2, VOCABULARY)
    request = Request(1, [3], [], PARAMS, 100)
    draw(sampler, [request], 0, 1)
    counts = sampler.slots.counts
    # A wrong count that stays shows that nothing is counted twice.
    counts.output_counts[sampler.slots._slots[1].index, VOCABULARY] = 40
    sampler.sample(torch.zeros(1, VOCABULARY), [request])
    assert counts.output_counts[sampler.slots._slots[1].index, VOCABULARY] == 40


def test_a_token_that_was_drawn_in_vain_is_forgotten() -> None:
    """A step that failed after its draw is repeated: the table follows the request, not the op."""
    sampler = Sampler(CPU, 2, VOCABULARY)
    request = Request(1, [3], [], PARAMS, 100)
    sampler.sample(torch.zeros(1, VOCABULARY), [request])
    draw(sampler, [request], 0, 2)


def test_tokens_in_flight_cannot_be_counted() -> None:
    counts = TokenCounts(CPU, 1, VOCABULARY)
    request = Request(1, [3], [], PARAMS, 100)
    request.num_inflight_tokens = 1
    with pytest.raises(RuntimeError, match="in flight"):
        counts.begin(0, request)


def test_counts_end_at_their_type() -> None:
    counts = TokenCounts(CPU, 1, VOCABULARY)
    request = Request(1, [3], [], PARAMS, 100_000, output_token_ids=[5] * 100)
    request.token_ids = np.concatenate([[3], np.full(40_000, 5)])
    request.num_tokens = 40_001
    counts.begin(0, request)
    assert counts.output_counts[0, 5] == 32_767
