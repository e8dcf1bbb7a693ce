"""Bidirectional spans in the engine: Gemma 3, whose pictures' tokens see each other, token for token."""

from __future__ import annotations

import hashlib
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Gemma3ForConditionalGeneration

from executor_service.engine.limits import EngineLimits
from executor_service.engine.messages import FinishReason, SamplingParams
from executor_service.engine.prefix_digests import extend_digests
from executor_service.engine.request import EngineItem, Request
from executor_service.engine.scheduler import ScheduledRequest
from executor_service.engine.spans import checked_spans
from executor_service.engine.step_inputs import InputStage, lay_out
from registry import ItemLayout, PlaceholderRange, Run
from registry.errors import CheckpointError, InvalidHookError
from tests.executor_service.conftest import Bench, boot_engine, load_reference, picture
from tests.plugins.checkpoints import make_gemma3

PLUGIN = "tests.plugins.gemma3"
BLOCK = 4
LIMITS = EngineLimits(
    max_num_batched_tokens=32, max_num_seqs=4, max_num_encoder_tokens=16, max_model_len=40, block_size=BLOCK
)
TEXTS = (
    "<image>",
    "What is this <image> and why?",
    "no picture at all, but quite a few words",
    "<image> or <image>, which one do you like better?",
    "Some words that go before the picture <image> and rather a lot of words that come after it, I think.",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_gemma3(tmp_path_factory.mktemp("gemma3"))


class Gemma3Bench(Bench):
    """transformers is told which tokens are a picture's, and asked once."""

    known: ClassVar[dict[bytes, list[int]]] = {}

    def expected(self, request: Request) -> list[int]:
        hasher = hashlib.sha256(f"{self.reference.dtype} {request.max_tokens}".encode())
        hasher.update(request.token_ids[: request.num_prompt_tokens].tobytes())
        for item in request.items:
            hasher.update(item.content_digest)
        if hasher.digest() not in self.known:
            self.known[hasher.digest()] = self._generate(request)
        return self.known[hasher.digest()]

    def _generate(self, request: Request) -> list[int]:
        ids = torch.from_numpy(request.token_ids[: request.num_prompt_tokens].copy())[None]
        kwargs = {}
        if request.items:
            pixels = [
                item.layout.tensors["pixel_values"].normalization.apply(item.tensors["pixel_values"].numpy())
                for item in request.items
            ]
            kwargs["pixel_values"] = torch.from_numpy(np.stack(pixels)).to(self.reference.dtype)
        count = request.max_tokens - request.num_prompt_tokens
        with torch.inference_mode():
            out = self.reference.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
                token_type_ids=(ids == 3).long(), do_sample=False, eos_token_id=None, pad_token_id=0, **kwargs,
            )  # fmt: skip
        return out[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def reference(checkpoint) -> Gemma3ForConditionalGeneration:
    return load_reference(checkpoint)


def make_bench(checkpoint, reference, **config) -> Gemma3Bench:
    return Gemma3Bench(checkpoint, boot_engine(checkpoint, plugins=(PLUGIN,), block_size=BLOCK, **config), reference)


def ask(bench: Bench, number: int, text: str, pictures: list[Image.Image], **sampling: object) -> Request:
    """A request whose items have content digests, as the front gives them."""
    request = bench.request(number, text, pictures, **sampling)
    for item in request.items:
        item.content_digest = hashlib.sha256(item.tensors["pixel_values"].numpy().tobytes()).digest()
    return request


def mixed_requests(bench: Bench, count: int = 10, **sampling: object) -> list[Request]:
    texts = [TEXTS[number % len(TEXTS)] for number in range(count)]
    return [
        ask(bench, number, text, [picture(7 * number + i) for i in range(text.count("<image>"))], **sampling)
        for number, text in enumerate(texts)
    ]


@pytest.mark.parametrize("budget", [512, 16, 23])
def test_tokens_equal_generate(checkpoint, reference, budget: int) -> None:
    """Also where a step has just room for one picture's tokens."""
    bench = make_bench(checkpoint, reference, max_num_batched_tokens=budget)
    requests = mixed_requests(bench)
    outputs = bench.run(requests)
    for request in requests:
        assert outputs[request.request_id] == bench.expected(request)


def test_float32_equals_generate(checkpoint) -> None:
    bench = make_bench(checkpoint, load_reference(checkpoint, torch.float32), dtype="float32")
    requests = mixed_requests(bench, 5)
    outputs = bench.run(requests)
    for request in requests:
        assert outputs[request.request_id] == bench.expected(request)


def test_causal_pictures_give_other_tokens(checkpoint, reference, monkeypatch) -> None:
    """What the tests above would see if spans were lost."""
    bench = make_bench(checkpoint, reference)
    monkeypatch.setattr(type(bench.engine.runner.model), "bidirectional_spans", lambda self, items: [])
    requests = [request for request in mixed_requests(bench) if request.items]
    outputs = bench.run(requests)
    assert any(outputs[request.request_id] != bench.expected(request) for request in requests)


def test_preemption(checkpoint, reference) -> None:
    memory = 70 * 2 * 2 * BLOCK * 2 * 16 * 8
    bench = make_bench(checkpoint, reference, max_model_len=160, kv_cache_memory=memory, max_num_batched_tokens=40)
    requests = mixed_requests(bench, 15, max_tokens=30)
    outputs = bench.run(requests)
    assert sum(request.num_preemptions for request in requests) > 0
    for request in requests:
        assert outputs[request.request_id] == bench.expected(request)


# --- the prefix cache -------------------------------------------------------------------------------


def test_a_prefix_may_end_within_a_picture(checkpoint, reference) -> None:
    """Its blocks there were computed with all of it: who continues needs only the rest of its tokens."""
    bench = make_bench(checkpoint, reference)
    first, second = (ask(bench, n, f"Look at <image>{text}", [picture(1)]) for n, text in ((1, " now"), (2, "?!")))
    ((begin, end),) = bench.engine.runner.bidirectional_spans(first.items)
    expected = [bench.expected(request) for request in (first, second)]
    assert expected[0] != expected[1]
    assert bench.run([first])[1] == expected[0]
    assert bench.run([second])[2] == expected[1]
    assert begin < second.num_cached_tokens < end
    assert second.num_cached_tokens == first.items[0].placeholder.end // BLOCK * BLOCK


def test_two_pictures_never_share(checkpoint, reference) -> None:
    bench = make_bench(checkpoint, reference)
    first, second = (ask(bench, number, TEXTS[-1], [picture(number)]) for number in (1, 2))
    expected = [bench.expected(request) for request in (first, second)]
    assert expected[0] != expected[1]
    assert bench.run([first])[1] == expected[0]
    assert bench.run([second])[2] == expected[1]
    assert second.num_cached_tokens == first.items[0].placeholder.offset // BLOCK * BLOCK


def spanned(num_tokens: int, ranges: list[tuple[int, int]], spans: list[tuple[int, int]]) -> Request:
    """Token n is n; an item in each range."""
    items = [
        EngineItem(
            PlaceholderRange(begin, end - begin), "image", ItemLayout((Run(9, end - begin),), {}), {},
            content_digest=b"content",
        )
        for begin, end in ranges
    ]  # fmt: skip
    request = Request(0, list(range(num_tokens)), items, SamplingParams(max_tokens=1), 100)
    request.spans = spans
    return request


@pytest.mark.parametrize("changed", ["extent", "token"])
def test_a_block_is_known_by_the_whole_span_that_reaches_into_it(changed: str) -> None:
    requests = [spanned(40, [(6, 20)], [(7, 19)]) for _ in range(2)]
    if changed == "extent":
        requests[1].spans = [(7, 18)]
    else:
        requests[1].token_ids[17] = 0
    for request in requests:
        extend_digests(request, BLOCK, 10)
    same = [a == b for a, b in zip(*(request.block_digests for request in requests), strict=True)]
    assert same == [True] + [False] * 9


# --- what a step is told ----------------------------------------------------------------------------


def test_visible_ends_of_a_batch() -> None:
    """A decode, a chunk with a span, one that begins within a span, and one of text."""
    requests = [spanned(*arguments) for arguments in (
        (9, [(1, 5)], [(1, 5)]), (12, [(3, 9)], [(4, 8)]), (10, [(2, 7)], [(2, 7)]), (4, [], []),
    )]  # fmt: skip
    for request, computed in zip(requests, (8, 2, 4, 0), strict=True):
        request.num_computed_tokens = computed
        request.block_table.extend(range(4))
    batch = [ScheduledRequest(request, n) for request, n in zip(requests, (1, 7, 6, 4), strict=True)]
    host = lay_out(batch, BLOCK)
    expected = [9, *[3, 4, 8, 8, 8, 8, 9], *[7, 7, 7, 8, 9, 10], *[1, 2, 3, 4]]
    assert host.visible_ends is not None
    assert host.visible_ends.tolist() == expected
    assert host.visible_ends.dtype == np.int32
    inputs, (rows, places) = InputStage(torch.device("cpu"), LIMITS).upload(
        host, np.arange(4), np.full((18, 2), -1, dtype=np.int32)
    )
    assert inputs.metadata.visible_ends.tolist() == expected
    assert (rows.tolist(), places.shape) == ([0, 1, 2, 3], (18, 2))
    requests[1].num_computed_tokens = 8
    assert lay_out([batch[0], ScheduledRequest(requests[1], 4), batch[3]], BLOCK).visible_ends is None


@pytest.mark.parametrize(
    ("computed", "asked", "allowed"), [(0, 4, 4), (0, 5, 4), (0, 7, 4), (0, 8, 8), (4, 3, 0), (6, 1, 0), (6, 2, 2)]
)
def test_a_chunk_ends_in_no_span(computed: int, asked: int, allowed: int) -> None:
    request = spanned(12, [(3, 9)], [(4, 8)])
    request.num_computed_tokens = computed
    assert request.without_cut(asked) == allowed


# --- what a model may say ---------------------------------------------------------------------------


@pytest.mark.parametrize("spans", [[(2, 5)], [(5, 11)], [(12, 14)], [(6, 8), (7, 9)], [(7, 9), (3, 5)], [(5, 5)]])
def test_spans_are_in_order_and_within_items(spans: list[tuple[int, int]]) -> None:
    items = spanned(30, [(3, 10), (15, 20)], []).items
    assert checked_spans([(4, 6), (6, 10), (15, 20)], items, 10) == ((4, 6), (6, 10), (15, 20))
    with pytest.raises(InvalidHookError, match="each within one item's placeholder range"):
        checked_spans(spans, items, 10)


def test_a_boot_with_too_small_steps_says_so(checkpoint) -> None:
    with pytest.raises(CheckpointError, match=r"--max-num-batched-tokens is 15; raise it to 16$"):
        boot_engine(checkpoint, plugins=(PLUGIN,), max_num_batched_tokens=15)


def test_spans_of_no_use_end_that_request_alone(checkpoint, reference, monkeypatch) -> None:
    bench = make_bench(checkpoint, reference)
    model = bench.engine.runner.model
    good = type(model).bidirectional_spans
    first, second = (ask(bench, number, TEXTS[0], [picture(number)]) for number in (1, 2))
    monkeypatch.setattr(
        type(model), "bidirectional_spans", lambda self, items: [(0, 99)] if items is first.items else good(self, items)
    )
    for request in (first, second):
        bench.engine.add(request)
    report = bench.engine.step()
    (ended,) = report.end.finished
    assert (ended.request_id, ended.reason) == (1, FinishReason.FAILED)
    assert ended.error.startswith("bidirectional_spans: InvalidHookError: bidirectional_spans has 0 to 99")
    assert bench.run([])[2] == bench.expected(second)[1:]
