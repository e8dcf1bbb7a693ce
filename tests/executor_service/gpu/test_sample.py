"""The sampling kernel against the float64 reference: random parameters, shapes, dtypes, ties, padding, graphs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from executor_service.engine.messages import SamplingParams
from executor_service.engine.request import Request
from executor_service.engine.sampler import Sampler
from executor_service.engine.sampling_slots import SamplingSlots
from executor_service.kernels.sample import SamplingTables, sample
from tests.executor_service.gpu.sampling import Reference, random_request
from tests.executor_service.gpu.tensors import DTYPES, SEEDS, poison, random

pytestmark = pytest.mark.gpu

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
EOS = frozenset({2})


def prepared(requests: list[Request], num_slots: int, vocabulary: int) -> tuple[torch.Tensor, SamplingTables]:
    """Their slots and the tables, on the GPU."""
    slots = SamplingSlots(CUDA, num_slots, vocabulary, EOS)
    return torch.tensor(slots.prepare(requests)).cuda(), slots.tables


def numbers_of(requests: list[Request]) -> torch.Tensor:
    return torch.tensor([request.num_tokens for request in requests]).cuda()


@settings(max_examples=40)
@given(
    st.integers(0, 9), st.sampled_from([1, 7, 50, 1000, 4099, 32_064]), st.sampled_from([3.0, 0.3, 0.0]), DTYPES, SEEDS
)
def test_sample(num_rows: int, vocabulary: int, spread: float, dtype: torch.dtype, seed: int) -> None:
    """Any mixture of parameters; logits with no spread are all equal."""
    check_rows(num_rows, vocabulary, spread, dtype, seed)


@pytest.mark.parametrize(("vocabulary", "dtype"), [
    (128_256, torch.bfloat16), (50_003, torch.float32), (151_936, torch.float16), (2**18, torch.bfloat16),
    (2**18 + 1, torch.float32), (262_208, torch.bfloat16), (400_001, torch.float16), (2**19, torch.bfloat16),
])  # fmt: skip
def test_large_vocabularies(vocabulary: int, dtype: torch.dtype) -> None:
    """Rows that do not fit into shared memory, and from 2^18 + 1 tokens on several groups for each amount."""
    for spread in (3.0, 0.2, 0.0):
        check_rows(8, vocabulary, spread, dtype, vocabulary)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_many_rows(dtype: torch.dtype) -> None:
    """More rows than multiprocessors, in their own order and in another one."""
    check_rows(300, 2000, 2.0, dtype, 1)
    check_rows(300, 2000, 2.0, dtype, 2, torch.randperm(300))


def check_rows(
    num_rows: int, vocabulary: int, spread: float, dtype: torch.dtype, seed: int, order: torch.Tensor | None = None
) -> None:
    rng = np.random.default_rng(seed)
    requests = [random_request(number, vocabulary, rng) for number in range(num_rows)]
    slots, tables = prepared(requests, num_rows + 1, vocabulary)
    slots[torch.from_numpy(rng.random(num_rows) < 0.1).cuda()] = -1
    logits = (random((num_rows, vocabulary), torch.float32, seed) * spread).to(dtype)
    before = SamplingTables(*(table.cpu() for table in tables))
    counts = tables.output_counts.cpu()
    poison()
    order = None if order is None else order.cuda()
    sampled = sample(logits, slots, numbers_of(requests), tables, order)
    token_ids, logprobs, top_ids = (part.cpu() for part in sampled)
    for row, slot in enumerate(slots.tolist()):
        token = int(token_ids[row])
        if slot < 0:
            assert token == 0
            continue
        reference = Reference(logits[row].cpu(), slot, requests[row].num_tokens, before)
        reference.check_token(token)
        if reference.num_logprobs >= 0:
            reference.check_logprobs(token, logprobs[row], top_ids[row])
        counts[slot, token] += requests[row].sampling.has_penalties
    assert torch.equal(counts, tables.output_counts.cpu())


def test_same_tokens_as_the_reference() -> None:
    """Nearly always not just allowed but equal: 64 rows of 20 steps, each engine following its own output."""
    rng = np.random.default_rng(0)
    batches = [[random_request(number, 5000, rng) for number in range(64)] for rng in (np.random.default_rng(7),) * 2]
    batches[1] = [
        Request(one.request_id, one.token_ids[: one.num_prompt_tokens], [], one.sampling, 100_000,
                output_token_ids=one.output_token_ids.tolist()) for one in batches[0]
    ]  # fmt: skip
    samplers = [Sampler(device, 64, 5000, EOS) for device in (CPU, CUDA)]
    num_equal = 0
    for step in range(20):
        logits = (random((64, 5000), torch.float32, step) * float(rng.uniform(1, 4))).bfloat16()
        expected = samplers[0].sample(logits.cpu(), batches[0]).result().token_ids
        pending = samplers[1].sample(logits, batches[1])
        got = pending.result().token_ids
        assert pending.token_ids.tolist() == got
        num_equal += sum(one == other for one, other in zip(expected, got, strict=True))
        for token, one, other in zip(expected, *batches, strict=True):
            one.append(token, frozenset())
            other.append(token, frozenset())
            other.num_inflight_tokens = 0
    assert num_equal >= 20 * 64 - 3


def test_tokens_in_flight_count() -> None:
    """A host that learns of each token one step late gets the tokens of one that waits for each."""
    config = SamplingParams(1000, presence_penalty=2.0, repetition_penalty=1.5, min_tokens=7, logprobs=2, seed=3)
    prompt = [1, 7, 7, 9]
    waits, runs_ahead = ([Request(n, prompt[: n + 1], [], config, 2000) for n in range(4)] for _ in "ab")
    samplers = [Sampler(CUDA, 4, 64, EOS) for _ in "ab"]
    last = None
    for step in range(12):
        logits = random((4, 64), torch.bfloat16, step)
        expected = samplers[0].sample(logits, waits).result()
        pending = samplers[1].sample(logits, runs_ahead)
        for request, token in zip(waits, expected.token_ids, strict=True):
            request.append(token, frozenset())
        for request in runs_ahead:
            request.num_inflight_tokens += 1
        if last is not None:
            for request, token in zip(runs_ahead, last[0].result().token_ids, strict=True):
                request.append(token, frozenset())
                request.num_inflight_tokens = 1
            assert last[0].result() == last[1]
        last = pending, expected


def test_draws_follow_the_distribution() -> None:
    """Chi-square of 131,072 draws with every filter and penalties; the 99.99 % quantile."""
    config = {"temperature": 1.6, "min_p": 0.02, "top_k": 20, "top_p": 0.97, "repetition_penalty": 1.7,
              "presence_penalty": 0.4, "frequency_penalty": 0.3, "logit_bias": ((3, 2.5), (9, 4.0))}  # fmt: skip
    requests = [
        Request(n, [1, 7, 7, 9], [], SamplingParams(1 << 14, seed=n, **config), 1 << 15, output_token_ids=[5, 9, 5])
        for n in range(256)
    ]
    row = (random((1, 50), torch.float32, 3) * 2).expand(256, -1).contiguous()
    slots, tables = prepared(requests, 256, 50)
    start = tables.output_counts.clone()
    tokens = []
    for step in range(512):
        tables.output_counts.copy_(start)
        tokens.append(sample(row, slots, numbers_of(requests) + step, tables).token_ids)
    counts = torch.cat(tokens).bincount(minlength=50).cpu().double()
    reference = Reference(row[0].cpu(), int(slots[0]), 7, SamplingTables(*(t.cpu() for t in (*tables[:-1], start))))
    expected = reference.probabilities() * counts.sum()
    kept = expected > 0
    assert kept.sum() > 5
    assert counts[~kept].sum() == 0
    freedom = int(kept.sum()) - 1
    chi_square = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom) + 12


def test_a_row_does_not_depend_on_its_batch() -> None:
    """Nor on how many rows there are, nor on which of them begin."""
    rng = np.random.default_rng(3)
    requests = [random_request(number, 32_064, rng) for number in range(150)]
    logits = (random((150, 32_064), torch.float32, 5) * 3).bfloat16()
    slots, tables = prepared(requests, 160, 32_064)
    start = tables.output_counts.clone()
    together = sample(logits, slots, numbers_of(requests), tables).token_ids.tolist()
    for order in (torch.randperm(150), torch.randperm(150)[:140], torch.randperm(150)[:5], torch.tensor([9])):
        tables.output_counts.copy_(start)
        rows = order.cuda()
        some = sample(logits[rows], slots[rows], numbers_of(requests)[rows], tables).token_ids.tolist()
        assert some == [together[row] for row in order.tolist()]
    for order in (torch.randperm(150), torch.arange(149, -1, -1)):
        tables.output_counts.copy_(start)
        assert sample(logits, slots, numbers_of(requests), tables, order.cuda()).token_ids.tolist() == together


def test_the_sampler_begins_with_the_longest_rows() -> None:
    """More rows than run at once, of all kinds: the tokens of requests that come one by one."""
    num_rows = torch.cuda.get_device_properties(0).multi_processor_count + 20
    batches = [[random_request(n, 999, rng) for n in range(num_rows)] for rng in map(np.random.default_rng, (5, 5))]
    logits = (random((num_rows, 999), torch.float32, 6) * 3).bfloat16()
    together, alone = (Sampler(CUDA, num_rows, 999, EOS) for _ in "ab")
    assert together.slots.order(together.slots.prepare(batches[0]), num_rows - 20) is not None
    expected = [alone.sample(logits[n : n + 1], [one]).result().token_ids[0] for n, one in enumerate(batches[1])]
    assert together.sample(logits, batches[0]).result().token_ids == expected


def test_replayed_graph_takes_new_inputs() -> None:
    """Slots, numbers and logits change at their addresses; the counts that the graph left behind are seen."""
    config = SamplingParams(100, temperature=0.0, presence_penalty=50.0)
    requests = [Request(n, [1, 2], [], config, 1000) for n in range(3)]
    slots, tables = prepared(requests, 3, 64)
    logits, numbers = random((4, 64), torch.bfloat16, 0), torch.full((4,), 2).cuda()
    chosen = torch.full((4,), -1).cuda()
    sample(logits, chosen, numbers, tables)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampled = sample(logits, chosen, numbers, tables)
    order = logits[0].float().topk(3).indices.tolist()
    for expected in ([order[0], 0, 0, 0], [order[1], 0, 0, 0]):
        chosen[0] = slots[1]
        graph.replay()
        assert sampled.token_ids.tolist() == expected
    chosen[:] = torch.tensor([-1, -1, slots[0], slots[1]]).cuda()
    logits.copy_(logits[:1].expand(4, -1).clone())
    graph.replay()
    assert sampled.token_ids.tolist() == [0, 0, order[0], order[2]]


@pytest.mark.parametrize("values", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_hopeless_logits_give_a_token(values: float) -> None:
    """Nothing hangs and every id is in the vocabulary, whatever a broken model puts out."""
    kinds = [{}, {"top_p": 0.5}, {"top_k": 3}, {"top_k": 500}, {"min_p": 0.5}, {"logprobs": 20}, {"temperature": 0.0}]
    requests = [Request(n, [1], [], SamplingParams(9, presence_penalty=1.0, **kind), 9) for n, kind in enumerate(kinds)]
    slots, tables = prepared(requests, len(kinds), 1000)
    for part in (slice(None), slice(500), slice(7, 8)):
        logits = random((len(kinds), 1000), torch.float32, 1)
        logits[:, part] = values
        token_ids = sample(logits, slots, numbers_of(requests), tables).token_ids
        assert ((token_ids >= 0) & (token_ids < 1000)).all()


def test_unknown_types_and_sizes_are_refused() -> None:
    request = Request(0, [1], [], SamplingParams(9), 9)
    slots, tables = prepared([request], 1, 1000)
    with pytest.raises(TypeError, match="float64"):
        sample(torch.zeros((1, 1000), dtype=torch.float64, device="cuda"), slots, numbers_of([request]), tables)
    with pytest.raises(ValueError, match="at most 524288"):
        sample(torch.zeros((1, 2**19 + 1), device="cuda"), slots, numbers_of([request]), tables)
    with pytest.raises(ValueError, match="for 2000 logits"):
        sample(torch.zeros((1, 2000), device="cuda"), slots, numbers_of([request]), tables)


def test_opcheck() -> None:
    rng = np.random.default_rng(1)
    requests = [random_request(number, 300, rng) for number in range(5)]
    for request in requests:
        object.__setattr__(request.sampling, "logprobs", 20)
    slots, tables = prepared(requests, 5, 300)
    arguments = (random((5, 300), torch.bfloat16, 0), slots, numbers_of(requests), *tables)
    for order in (None, torch.tensor([3, 1, 4, 0, 2]).cuda()):
        torch.library.opcheck(torch.ops.diptych.sample.default, (*arguments[:3], order, *arguments[3:]))
