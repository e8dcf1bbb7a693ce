"""Sampling in the engine: equal to `generate()` with the same processors, whatever batches and preemption do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from executor_service.engine.logprobs import PendingLogprobs
from executor_service.engine.messages import FinishReason, TokenLogprobs
from executor_service.engine.request import Request
from tests.checkpoints import VOCAB_SIZE
from tests.executor_service.conftest import Bench, boot_engine, picture

BLOCK_BYTES = 2 * 2 * 4 * 2 * 16 * 8
TEXTS = ["A short one {}", "{} and then a prompt that goes on for rather longer than the first one did", "x{}", "{}"]


@pytest.fixture(scope="module")
def bench(checkpoint, reference) -> Bench:
    return Bench(checkpoint, boot_engine(checkpoint), reference)


def make(bench: Bench, number: int, **sampling: object) -> Request:
    images = number % 4
    text = TEXTS[number % 4].format("<image>" * images) + " tail" * (number % 7) + "?"
    pictures = [picture(10 * number + index, 40 + 7 * index, 90) for index in range(images)]
    return bench.request(number, text, pictures, **{"max_tokens": 14, **sampling})


class OutputPenalties(LogitsProcessor):
    """Presence and frequency, which transformers lacks."""

    def __init__(self, prompt_length: int, presence: float, frequency: float) -> None:
        self.prompt_length, self.presence, self.frequency = prompt_length, presence, frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(input_ids[0, self.prompt_length :], minlength=scores.shape[-1])
        return scores - self.frequency * counts - self.presence * (counts > 0)


def generate(bench: Bench, request: Request, eos: int | None = None, own: tuple = (), **arguments: object) -> list[int]:
    """transformers' greedy tokens with its own arguments."""
    ids = torch.from_numpy(request.token_ids[: request.num_prompt_tokens].copy())[None]
    pixels = [item.layout.tensors["pixel_values"].normalization.apply(item.tensors["pixel_values"].numpy())
              for item in request.items]  # fmt: skip
    kwargs = {"pixel_values": torch.from_numpy(np.stack(pixels)).double()} if pixels else {}
    with torch.inference_mode():
        out = bench.reference.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.sampling.max_tokens,
            do_sample=False, eos_token_id=eos, pad_token_id=0, logits_processor=LogitsProcessorList(own),
            **arguments, **kwargs,
        )  # fmt: skip
    return out[0, ids.shape[1] :].tolist()


def test_repetition_penalty_equals_generate(bench: Bench) -> None:
    """Placeholder tokens are in transformers' input_ids, so they count as the prompt's."""
    requests = [make(bench, n, repetition_penalty=[1.3, 3.0, 0.6, 1.0][n % 4]) for n in range(8)]
    outputs = bench.run(requests)
    for request in requests:
        penalty = float(request.sampling.repetition_penalty)
        assert outputs[request.request_id] == generate(bench, request, repetition_penalty=penalty)
    assert any(outputs[r.request_id] != bench.expected(r) for r in requests), "the penalty did something"


def test_presence_and_frequency_equal_generate(bench: Bench) -> None:
    values = [(2.0, 0.0), (0.0, 2.0), (-2.0, 0.5), (1.5, 1.5)]
    requests = [make(bench, n, presence_penalty=values[n][0], frequency_penalty=values[n][1]) for n in range(4)]
    outputs = bench.run(requests)
    for request, (presence, frequency) in zip(requests, values, strict=True):
        own = OutputPenalties(request.num_prompt_tokens, presence, frequency)
        assert outputs[request.request_id] == generate(bench, request, own=(own,))
    assert outputs[0] != bench.expected(requests[0])


def test_bias_and_bad_words_equal_generate(bench: Bench) -> None:
    plain = bench.run([make(bench, n) for n in range(4)])
    words = {n: [plain[n][:1], plain[n][1:3], plain[n][4:7], [5]] for n in plain}
    bias = {n: ((plain[n][3], -100.0), (17, 3.0), (VOCAB_SIZE - 1, 2.0)) for n in plain}
    requests = [make(bench, n, bad_words=tuple(map(tuple, words[n])), logit_bias=bias[n]) for n in plain]
    outputs = bench.run(requests)
    for n, request in enumerate(requests):
        expected = generate(
            bench, request, bad_words_ids=words[n], sequence_bias=[[[token], value] for token, value in bias[n]]
        )
        assert outputs[n] == expected != plain[n]


def test_min_tokens_equals_generate(bench: Bench, checkpoint, reference) -> None:
    """End-of-text is made likely by a bias, so that it would end every answer at once."""
    eos = next(iter(bench.engine.eos_token_ids))
    bias = ((eos, 60.0),)
    for min_tokens in (0, 1, 5):
        requests = [make(bench, n, ignore_eos=False, min_tokens=min_tokens, logit_bias=bias) for n in range(4)]
        outputs = bench.run(requests)
        for n, request in enumerate(requests):
            minimum = {"min_new_tokens": min_tokens} if min_tokens else {}
            assert outputs[n] == generate(bench, request, eos, sequence_bias=[[[eos], 60.0]], **minimum)
            assert len(outputs[n]) == min_tokens + 1
            assert request.finish_reason is FinishReason.STOP


def test_min_tokens_holds_stop_tokens_back(bench: Bench) -> None:
    plain = bench.run([make(bench, 1)])[1]
    stop = frozenset({plain[0], plain[2]})
    assert len(bench.run([make(bench, 1, stop_token_ids=stop)])[1]) == 1
    tokens = bench.run([make(bench, 1, stop_token_ids=stop, min_tokens=6)])[1]
    assert len(tokens) > 6
    assert not stop & set(tokens[:6])


EVERYTHING = {
    "temperature": 1.4,
    "min_p": 0.01,
    "top_k": 100,
    "top_p": 0.98,
    "repetition_penalty": 1.4,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.4,
    "logit_bias": ((9, 3.0), (10, -4.0)),
    "bad_words": ((11,), (9, 12)),
    "min_tokens": 4,
    "max_tokens": 30,
}


def mixture(bench: Bench) -> list[Request]:
    """Constrained, plain and greedy requests in turn, all seeded, some with prompt log probabilities."""
    kinds = [EVERYTHING, {"temperature": 1.0}, {}, {**EVERYTHING, "temperature": 0.0}]
    return [
        make(bench, n, seed=1000 + n, prompt_logprobs=2 if n % 3 == 0 else None, **{"max_tokens": 30, **kinds[n % 4]})
        for n in range(8)
    ]


@pytest.fixture(scope="module")
def undisturbed(bench: Bench) -> dict[int, list[int]]:
    """Every request of the mixture alone."""
    return {request.request_id: bench.run([request])[request.request_id] for request in mixture(bench)}


def test_seeded_output_does_not_depend_on_the_batch(bench: Bench, undisturbed) -> None:
    assert bench.run(mixture(bench)) == undisturbed
    assert bench.run(mixture(bench)[::-1]) == undisturbed
    assert bench.run(mixture(bench)[2:5]) == {n: undisturbed[n] for n in (2, 3, 4)}
    assert len({tuple(tokens) for tokens in undisturbed.values()}) == 8


@pytest.mark.parametrize(
    "settings", [{"max_num_batched_tokens": 7}, {"max_num_batched_tokens": 33}, {"max_num_seqs": 2}]
)
def test_seeded_output_does_not_depend_on_chunks_and_slots(checkpoint, reference, undisturbed, settings) -> None:
    bench = Bench(checkpoint, boot_engine(checkpoint, **settings), reference)
    assert bench.run(mixture(bench)) == undisturbed


def test_seeded_output_does_not_depend_on_preemption(bench: Bench, checkpoint, reference) -> None:
    """Short prompts and long answers in few blocks: all fit at first, and most have to go while they grow."""

    def requests() -> list[Request]:
        many = {**EVERYTHING, "max_tokens": 60, "prompt_logprobs": 1}
        return [
            bench.request(n, f"{n}" + "<image>" * (n % 2), [picture(n)] * (n % 2), seed=n, **many) for n in range(8)
        ]

    booted = boot_engine(checkpoint, max_model_len=160, block_size=4, kv_cache_memory=50 * BLOCK_BYTES)
    together = requests()
    outputs = Bench(checkpoint, booted, reference).run(together)
    assert sum(request.num_preemptions for request in together) > 3
    assert outputs == {one.request_id: bench.run([one])[one.request_id] for one in requests()}


def test_a_number_used_again_has_nothing_of_the_old_request(bench: Bench) -> None:
    first = bench.run([make(bench, 1, **EVERYTHING)])
    bench.run([make(bench, 1, **EVERYTHING)], steps=5)
    bench.engine.abort([1])
    bench.run([])
    assert bench.run([make(bench, 1, **EVERYTHING)]) == first
    assert not len(bench.engine.runner.sampler.slots)


# --- log probabilities of the prompt ------------------------------------------------------------------


def prompt_scores(bench: Bench, requests: list[Request]) -> dict[int, list[TokenLogprobs]]:
    """By request; it is also checked that all come before the first token."""
    for request in requests:
        bench.engine.add(request)
    found: dict[int, list[TokenLogprobs]] = {request.request_id: [] for request in requests}
    answered = set()
    while bench.engine.has_work:
        report = bench.engine.step()
        for number, entries in report.tokens.prompt_logprobs:
            assert number not in answered
            found[number] += entries
        answered |= set(report.tokens.request_ids)
    return found


def expected_scores(bench: Bench, request: Request) -> torch.Tensor:
    """transformers' log probabilities of every token that follows a prompt position: [n - 1, vocabulary]."""
    ids = torch.from_numpy(request.token_ids[: request.num_prompt_tokens].copy())[None]
    pixels = [item.layout.tensors["pixel_values"].normalization.apply(item.tensors["pixel_values"].numpy())
              for item in request.items]  # fmt: skip
    kwargs = {"pixel_values": torch.from_numpy(np.stack(pixels)).double()} if pixels else {}
    with torch.inference_mode():
        return bench.reference(input_ids=ids, **kwargs).logits[0, :-1].log_softmax(-1)


def check_scores(bench: Bench, requests: list[Request], found: dict[int, list[TokenLogprobs]]) -> None:
    for request in requests:
        entries, count = found[request.request_id], request.sampling.prompt_logprobs
        if count is None:
            assert entries == []
            continue
        rows = expected_scores(bench, request)
        assert [entry.token_id for entry in entries] == request.token_ids[1 : request.num_prompt_tokens].tolist()
        for row, entry in zip(rows, entries, strict=True):
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-9)
            assert [value for _, value in entry.top] == pytest.approx(row.topk(count).values.tolist(), abs=1e-9)
            assert [token for token, _ in entry.top] == row.topk(count).indices.tolist()


@pytest.mark.parametrize("budget", [5, 33, 512])
def test_prompt_logprobs_equal_transformers(checkpoint, reference, budget: int) -> None:
    """With pictures, in chunks of every size, mixed with requests that do not ask and with penalised ones."""
    bench = Bench(checkpoint, boot_engine(checkpoint, max_num_batched_tokens=budget), reference)
    counts = [3, None, 0, 20, 1]
    requests = [make(bench, n, prompt_logprobs=counts[n], max_tokens=3, repetition_penalty=2.0) for n in range(5)]
    check_scores(bench, requests, prompt_scores(bench, requests))


def test_prompt_logprobs_come_once_when_preempted(checkpoint, reference) -> None:
    booted = boot_engine(
        checkpoint, max_model_len=160, block_size=4, kv_cache_memory=50 * BLOCK_BYTES, max_num_batched_tokens=9
    )
    bench = Bench(checkpoint, booted, reference)
    requests = [make(bench, n, prompt_logprobs=1, max_tokens=40) for n in range(6)]
    found = prompt_scores(bench, requests)
    assert sum(request.num_preemptions for request in requests) > 1
    check_scores(bench, requests, found)


def test_a_long_prompt_is_scored_in_bounded_pieces(bench: Bench, monkeypatch) -> None:
    rows: list[int] = []
    compute = bench.engine.runner.model.compute_logits
    monkeypatch.setattr(
        bench.engine.runner.model, "compute_logits", lambda hidden: rows.append(len(hidden)) or compute(hidden)
    )
    request = bench.request(0, "many words " * 60, [], prompt_logprobs=1, max_tokens=1)
    found = prompt_scores(bench, [request])
    assert len(found[0]) == request.num_prompt_tokens - 1 > 200
    assert max(rows) == 64


def test_a_prompt_of_one_token_has_no_logprobs(bench: Bench) -> None:
    request = bench.request(0, "", [], prompt_logprobs=5, max_tokens=1)
    assert request.num_prompt_tokens == 1
    assert prompt_scores(bench, [request]) == {0: []}


def test_a_placeholder_without_a_logit_is_impossible() -> None:
    """Some families have placeholder ids beyond their embedding."""
    (entry,) = PendingLogprobs(torch.zeros(1, 10), [10], [2]).result()
    assert entry.logprob == -torch.inf
    assert len(entry.top) == 2
