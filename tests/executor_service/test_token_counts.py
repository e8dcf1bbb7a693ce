"""The table of token counts is what the requests' own tokens say, whatever happened in between."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from executor_service.engine.messages import SamplingParams
from executor_service.engine.request import Request
from executor_service.engine.token_counts import TokenCounts

VOCABULARY = 20
PARAMS = SamplingParams(max_tokens=50, ignore_eos=True, repetition_penalty=1.5)


def check(counts: TokenCounts, requests: list[Request]) -> None:
    slots = counts.update(requests, VOCABULARY).tolist()
    assert len(set(slots)) == len(slots)
    for slot, request in zip(slots, requests, strict=True):
        prompt = request.token_ids[: request.num_prompt_tokens]
        seen = np.bincount(prompt[prompt < VOCABULARY], minlength=VOCABULARY) > 0
        assert counts.prompt_seen[slot].tolist() == seen.tolist()
        expected = np.bincount(request.output_token_ids, minlength=VOCABULARY)
        assert counts.output_counts[slot].tolist() == expected.tolist()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_history(data: st.DataObject) -> None:
    """Requests come, get tokens, are looked at in batches of all sizes, are preempted, leave; numbers come again."""
    counts = TokenCounts(torch.device("cpu"))
    live: dict[int, Request] = {}
    for _ in range(data.draw(st.integers(1, 25))):
        number = data.draw(st.integers(0, 5))
        action = data.draw(st.sampled_from(["token", "token", "look", "look", "preempt", "leave"]))
        if number not in live:
            # Placeholders of some families are beyond the vocabulary.
            prompt = data.draw(st.lists(st.integers(0, VOCABULARY + 3), min_size=1, max_size=10))
            live[number] = Request(number, prompt, [], PARAMS, 100)
        if action == "token":
            for token in data.draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=3)):
                live[number].append(token, frozenset())
        elif action == "look":
            batch = data.draw(st.sets(st.sampled_from(sorted(live)), min_size=1))
            check(counts, [live[other] for other in batch])
        elif action == "preempt":
            live[number].reset_progress()
        else:
            counts.release(number)
            del live[number]
    check(counts, list(live.values()))


def test_only_new_tokens_are_counted_and_slots_are_kept() -> None:
    counts = TokenCounts(torch.device("cpu"))
    requests = [Request(number, [number], [], PARAMS, 100) for number in range(3)]
    slots = counts.update(requests, VOCABULARY).tolist()
    # A wrong count that stays shows that nothing is counted twice.
    counts.output_counts[slots[0], 5] = 40
    requests[0].append(5, frozenset())
    assert counts.update(requests, VOCABULARY).tolist() == slots
    assert counts.output_counts[slots[0], 5] == 41
    assert len(counts.prompt_seen) == 3
    check(counts, [Request(9, [1, 1, 2], [], PARAMS, 100)])
    assert len(counts.prompt_seen) == 3, "the least recently used slot was given away"
    check(counts, requests[:2])
