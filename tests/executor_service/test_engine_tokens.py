"""The engine's greedy tokens are transformers' own, whatever the batching does; and the controls that must fail."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from executor_service.engine import model_runner
from executor_service.engine.request import Request
from executor_service.layers import attention
from tests.checkpoints import make_llava_checkpoint
from tests.executor_service.conftest import Bench, boot_engine, load_reference, picture

TEXTS = ["A short one {}", "{} and then a prompt that goes on for rather longer than the first one did", "x{}", "{}"]


def mixed_requests(bench: Bench, count: int, **sampling: object) -> list[Request]:
    """`count` requests with 0 to 4 images each and prompts of mixed length."""
    requests = []
    for number in range(count):
        images = number % 5
        text = TEXTS[number % len(TEXTS)].format("<image>" * images) + " tail" * (number % 7) + "?"
        pictures = [picture(10 * number + i, 40 + 7 * i, 90) for i in range(images)]
        length = 6 + (number * 5) % 13
        requests.append(bench.request(number, text, pictures, **{"max_tokens": length, **sampling}))
    return requests


@pytest.fixture(scope="module", params=[("fused", "off"), ("stock", "off"), ("fused", "on")], ids="-".join)
def bench(request, checkpoint, reference) -> Bench:
    decoder, scheduling = request.param
    return Bench(checkpoint, boot_engine(checkpoint, decoder=decoder, async_scheduling=scheduling), reference)


@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_batches_equal_generate(bench: Bench, count: int) -> None:
    requests = mixed_requests(bench, count)
    outputs = bench.run(requests)
    for request in requests:
        assert outputs[request.request_id] == bench.expected(request)
    bench.engine.check_integrity()
    assert bench.engine.load.num_used_blocks == 0


@pytest.mark.parametrize("scheduling", ["off", "on"])
@pytest.mark.parametrize("budget", [7, 16, 33, 100])
def test_chunked_prefill_equals_generate(checkpoint, reference, budget: int, scheduling: str) -> None:
    booted = boot_engine(checkpoint, max_num_batched_tokens=budget, async_scheduling=scheduling)
    bench = Bench(checkpoint, booted, reference)
    requests = mixed_requests(bench, 6)
    outputs = bench.run(requests)
    for request in requests:
        assert outputs[request.request_id] == bench.expected(request)


@pytest.mark.parametrize("scheduling", ["off", "on"])
def test_forced_preemption_equals_generate(checkpoint, reference, scheduling: str) -> None:
    """Blocks for little more than one long request: most of the batch is preempted at least once."""
    memory = 50 * 2 * 2 * 4 * 2 * 16 * 8
    booted = boot_engine(
        checkpoint, max_model_len=160, block_size=4, kv_cache_memory=memory, async_scheduling=scheduling
    )
    bench = Bench(checkpoint, booted, reference)
    requests = mixed_requests(bench, 8, max_tokens=30)
    outputs = bench.run(requests)
    assert sum(request.num_preemptions for request in requests) > 3
    for request in requests:
        assert outputs[request.request_id] == bench.expected(request)


def test_requests_join_and_leave(bench: Bench) -> None:
    requests = mixed_requests(bench, 10, max_tokens=15)
    first, second, cancelled = requests[:4], requests[4:8], requests[8:]
    outputs = bench.run([*first, cancelled[0]], steps=3)
    more = bench.run([*second, cancelled[1]], steps=2)
    bench.engine.abort([request.request_id for request in cancelled])
    later = bench.run([])
    for request in (*first, *second):
        number = request.request_id
        got = outputs.get(number, []) + more.get(number, []) + later.get(number, [])
        assert got == bench.expected(request)


def test_cancel_frees_every_block_before_the_next_step(bench: Bench) -> None:
    requests = mixed_requests(bench, 6, max_tokens=50)
    bench.run(requests, steps=2)
    assert bench.engine.load.num_used_blocks > 0
    bench.engine.abort([request.request_id for request in requests])
    assert bench.engine.load.num_used_blocks == 0
    report = bench.engine.step()
    assert sorted(finished.request_id for finished in report.end.finished) == sorted(r.request_id for r in requests)


@pytest.mark.parametrize(
    "variant",
    [
        {"tower": "siglip", "processor": "siglip", "select_strategy": "full"},
        {"language": "mistral", "sliding_window": 24},
        {"language": "qwen2", "sliding_window": 24},
        {"feature_layer": [-2, -1]},
        {"select_strategy": "full", "tie": True},
        {"layout": "old", "shards": 3},
    ],
    ids=lambda variant: "-".join(map(str, variant.values())),
)
@pytest.mark.parametrize("decoder", ["fused", "stock"])
def test_family_variants_equal_generate(tmp_path, variant: dict, decoder: str) -> None:
    checkpoint = make_llava_checkpoint(tmp_path / "model", **variant)
    booted = boot_engine(checkpoint, max_num_batched_tokens=40, decoder=decoder)
    bench = Bench(checkpoint, booted, load_reference(checkpoint))
    requests = mixed_requests(bench, 4)
    outputs = bench.run(requests)
    for request in requests:
        assert outputs[request.request_id] == bench.expected(request)


def test_float32_logprobs_equal_transformers(checkpoint) -> None:
    """Log probabilities of chosen and likeliest tokens within 1e-4, in float32 with chunks and a batch."""
    bench = Bench(checkpoint, boot_engine(checkpoint, dtype="float32", max_num_batched_tokens=50),
                  load_reference(checkpoint, torch.float32))  # fmt: skip
    requests = mixed_requests(bench, 5, logprobs=5)
    found = bench.logprobs(requests)
    for request in requests:
        check_logprobs(bench, request, found[request.request_id])


def check_logprobs(bench: Bench, request: Request, entries: list) -> None:
    ids = torch.from_numpy(request.token_ids[: request.num_tokens].copy())[None]
    pixels = [item.layout.tensors["pixel_values"].normalization.apply(item.tensors["pixel_values"].numpy())
              for item in request.items]  # fmt: skip
    kwargs = {"pixel_values": torch.from_numpy(np.stack(pixels))} if pixels else {}
    with torch.inference_mode():
        logits = bench.reference(input_ids=ids, **kwargs).logits[0]
    logprobs = logits.double().log_softmax(-1)[request.num_prompt_tokens - 1 : -1]
    assert len(entries) == len(logprobs)
    for row, entry in zip(logprobs, entries, strict=True):
        assert abs(row[entry.token_id] - entry.logprob) < 1e-4
        assert len(entry.top) == 5
        torch.testing.assert_close(
            row.topk(5).values, torch.tensor([v for _, v in entry.top], dtype=torch.float64), atol=1e-4, rtol=0
        )


def test_positions_of_the_models_own(bench: Bench, monkeypatch) -> None:
    """A model may give prompt positions and a delta; text is then continued from there."""
    model = _Wrapped(bench.engine.runner.model, bench.engine.runner.model)
    model.positions = lambda ids, items: (np.arange(len(ids)) + 3, 3)
    monkeypatch.setattr(bench.engine.runner, "model", model)
    requests = mixed_requests(bench, 3)
    for request in requests:
        ids = request.token_ids[: request.num_prompt_tokens]
        request._prompt_positions, request._decode_delta = bench.engine.runner.prompt_positions(ids, request.items)
    outputs = bench.run(requests)
    for request in requests:
        # Rotary attention sees differences of positions only, so a common shift changes nothing.
        assert outputs[request.request_id] == bench.expected(request)


class TestNegativeControls:
    """The comparisons above would notice: each of these must change the tokens."""

    def outputs_differ(self, bench: Bench) -> bool:
        requests = mixed_requests(bench, 5)
        outputs = bench.run(requests)
        return any(outputs[request.request_id] != bench.expected(request) for request in requests)

    def test_shuffled_block_table(self, bench: Bench, monkeypatch) -> None:
        original = model_runner.lay_out

        def shuffled(*args):
            batch = original(*args)
            batch.block_tables[:, :2] = batch.block_tables[:, :2][:, ::-1].copy()
            return batch

        monkeypatch.setattr(model_runner, "lay_out", shuffled)
        assert self.outputs_differ(bench)

    def test_wrong_positions(self, bench: Bench, monkeypatch) -> None:
        model = bench.engine.runner.model

        def wrong(ids, positions, rows, **options):
            return model(ids, positions * 2, rows, **options)

        monkeypatch.setattr(bench.engine.runner, "model", _Wrapped(model, wrong))
        assert self.outputs_differ(bench)

    def test_swapped_features(self, bench: Bench, monkeypatch) -> None:
        model = bench.engine.runner.model
        wrapped = _Wrapped(model, model)
        wrapped.embed_multimodal = lambda pixel_values: [f.flip(0) for f in model.embed_multimodal(pixel_values)]
        monkeypatch.setattr(bench.engine.runner.encoder, "model", wrapped)
        assert self.outputs_differ(bench)

    def test_keys_not_written(self, bench: Bench, monkeypatch) -> None:
        decoder = bench.engine.runner.model.fused_decoder
        if decoder is None:
            monkeypatch.setattr(attention, "write_kv", lambda *args: None)
        else:
            write = decoder._rotary_write_kv
            monkeypatch.setattr(decoder, "_rotary_write_kv", lambda *args: write(*args[:5], torch.zeros_like(args[5])))
        assert self.outputs_differ(bench)


class _Wrapped:
    """The model with another forward."""

    def __init__(self, model, forward) -> None:
        self._model, self._forward = model, forward

    def __call__(self, *args, **options):
        return self._forward(*args, **options)

    def __getattr__(self, name):
        return getattr(self._model, name)
