"""The engine on a GPU: transformers' own greedy tokens by every path, whatever batching, chunks and caches do."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from executor_service.engine.request import Request
from registry.errors import CheckpointError
from tests.checkpoints import make_llava_checkpoint
from tests.executor_service import test_llava_next
from tests.executor_service.conftest import Bench, load_reference, picture
from tests.executor_service.gpu.booting import VARIANTS, boot_on_gpu, gpu_bench
from tests.executor_service.test_engine_tokens import check_logprobs, mixed_requests

pytestmark = pytest.mark.gpu

BLOCK_BYTES = 2 * 2 * 4 * 2 * 16 * 4
"""Of four tokens: keys and values, two layers, two heads of 16, float32."""
RANDOMLY = {"temperature": 1.1, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.2}


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def bench(request: pytest.FixtureRequest, checkpoint: Path, reference: Any) -> Bench:
    return gpu_bench(checkpoint, reference, **VARIANTS[request.param])


def check_equal_generate(bench: Bench, requests: list[Request]) -> None:
    """All at once; nothing stays behind."""
    outputs = bench.run(requests)
    for request in requests:
        assert outputs[request.request_id] == bench.expected(request), request.request_id
    bench.engine.check_integrity()
    assert bench.engine.load.num_used_blocks == 0


@pytest.mark.parametrize("count", [1, 5, 16])
def test_batches_equal_generate(bench: Bench, count: int) -> None:
    check_equal_generate(bench, mixed_requests(bench, count))


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
    assert bench.engine.load.num_used_blocks == 0


def test_every_cancelled_request_is_reported(bench: Bench) -> None:
    requests = mixed_requests(bench, 6, max_tokens=50)
    bench.run(requests, steps=3)
    bench.engine.abort([request.request_id for request in requests])
    finished: list[int] = []
    while bench.engine.has_work:
        finished += [one.request_id for one in bench.engine.step().end.finished]
    assert sorted(finished) == sorted(request.request_id for request in requests)
    assert bench.engine.load.num_used_blocks == 0


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch(bench: Bench) -> None:
    def make() -> list[Request]:
        return [
            bench.request(n, "Say <image> in other words", [picture(n)], max_tokens=20, seed=n, **RANDOMLY)
            for n in range(8)
        ]

    together = bench.run(make())
    for request in make():
        assert bench.run([request])[request.request_id] == together[request.request_id]
    (other,) = [bench.request(0, "Say <image> in other words", [picture(0)], max_tokens=20, seed=99, **RANDOMLY)]
    assert bench.run([other])[0] != together[0]


@pytest.mark.parametrize("budget", [7, 33, 100])
@pytest.mark.parametrize("decoder", ["fused", "stock"])
def test_chunked_prefill_equals_generate(checkpoint: Path, reference: Any, budget: int, decoder: str) -> None:
    bench = gpu_bench(checkpoint, reference, max_num_batched_tokens=budget, decoder=decoder, max_num_seqs=8)
    check_equal_generate(bench, mixed_requests(bench, 6))


def test_forced_preemption_equals_generate(checkpoint: Path, reference: Any) -> None:
    """Blocks for little more than one long request: most of the batch is preempted at least once."""
    bench = gpu_bench(
        checkpoint, reference, max_model_len=160, block_size=4, kv_cache_memory=50 * BLOCK_BYTES, max_num_seqs=8
    )
    requests = mixed_requests(bench, 8, max_tokens=30)
    check_equal_generate(bench, requests)
    assert sum(request.num_preemptions for request in requests) > 3


@pytest.mark.parametrize(
    "variant",
    [
        {"tower": "siglip", "processor": "siglip", "select_strategy": "full"},
        {"language": "mistral", "sliding_window": 24},
        {"language": "qwen2", "sliding_window": 24},
        {"feature_layer": [-2, -1]},
        {"select_strategy": "full", "tie": True},
    ],
    ids=lambda variant: "-".join(map(str, variant.values())),
)
@pytest.mark.parametrize("decoder", ["fused", "stock"])
def test_family_variants_equal_generate(tmp_path: Path, variant: dict[str, Any], decoder: str) -> None:
    checkpoint = make_llava_checkpoint(tmp_path / "model", **variant)
    bench = gpu_bench(
        checkpoint, load_reference(checkpoint), max_num_batched_tokens=40, decoder=decoder, max_num_seqs=8
    )
    check_equal_generate(bench, mixed_requests(bench, 4))


@pytest.mark.parametrize("decoder", ["fused", "stock"])
def test_llava_next_equals_generate(tmp_path: Path, decoder: str) -> None:
    """Pictures of several tiles, in one prompt and in one batch."""
    checkpoint = make_llava_checkpoint(tmp_path / "model", pinpoints=test_llava_next.PINPOINTS)
    bench = gpu_bench(
        checkpoint, load_reference(checkpoint), max_num_batched_tokens=200, decoder=decoder, max_num_seqs=8
    )
    check_equal_generate(bench, test_llava_next.mixed_requests(bench, 8))


def test_encoding_waits_for_nothing(tmp_path: Path) -> None:
    """A step that waits for its pictures' features is enqueued when the device has nothing left to do."""
    checkpoint = make_llava_checkpoint(tmp_path / "model", pinpoints=test_llava_next.PINPOINTS)
    bench = Bench(checkpoint, boot_on_gpu(checkpoint, decoder="fused"), None)
    items = [item for request in test_llava_next.mixed_requests(bench, 4) for item in request.items]
    for item in items:
        item.tensors = {name: tensor.pin_memory() for name, tensor in item.tensors.items()}
    bench.engine.runner.encoder.encode(items)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # of torch's, that it may not see every wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            bench.engine.runner.encoder.encode(items)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("decoder", ["fused", "stock"])
def test_logprobs_equal_transformers(checkpoint: Path, decoder: str) -> None:
    """Log probabilities of chosen and likeliest tokens within 1e-4 of transformers' float32 on the CPU."""
    bench = gpu_bench(checkpoint, load_reference(checkpoint, torch.float32), max_num_batched_tokens=50, decoder=decoder)
    requests = mixed_requests(bench, 5, logprobs=5)
    found = bench.logprobs(requests)
    for request in requests:
        check_logprobs(bench, request, found[request.request_id])


class TestCaches:
    """What others have computed is used, and what differs is not."""

    TEXT = "Some words that go before the picture <image> and rather a lot of words that come after it, I think."

    @pytest.fixture(params=["fused", "stock"])
    def bench(self, request: pytest.FixtureRequest, checkpoint: Path, reference: Any) -> Bench:
        """A fresh engine: its caches are empty."""
        return gpu_bench(
            checkpoint, reference, decoder=request.param, block_size=4, max_num_batched_tokens=64, max_num_seqs=8
        )

    def ask(self, bench: Bench, number: int, seed: int, **sampling: Any) -> Request:
        request = bench.request(number, self.TEXT, [picture(seed)], **sampling)
        for item in request.items:
            item.content_digest = hashlib.sha256(item.tensors["pixel_values"].numpy().tobytes()).digest()
        return request

    def test_the_same_request_again(self, bench: Bench) -> None:
        first, second = self.ask(bench, 1, seed=1), self.ask(bench, 2, seed=1)
        expected = bench.expected(first)
        assert bench.run([first])[1] == expected
        assert bench.run([second])[2] == expected
        assert second.num_cached_tokens == (second.num_prompt_tokens - 1) // 4 * 4
        assert bench.engine.scheduler.counters.num_encoded_items == 1

    def test_two_pictures_never_share(self, bench: Bench) -> None:
        first, second = self.ask(bench, 1, seed=1), self.ask(bench, 2, seed=2)
        expected = [bench.expected(first), bench.expected(second)]
        assert bench.run([first])[1] == expected[0]
        assert bench.run([second])[2] == expected[1] != expected[0]
        assert second.num_cached_tokens == first.items[0].placeholder.offset // 4 * 4

    def test_a_picture_is_encoded_once_for_all(self, bench: Bench) -> None:
        requests = [self.ask(bench, number, seed=5, max_tokens=4 + number) for number in range(6)]
        outputs = bench.run(requests)
        for request in requests:
            assert outputs[request.request_id] == bench.expected(request)
        assert bench.engine.scheduler.counters.num_encoded_items == 1


class TestNegativeControls:
    """The comparisons above would notice: each of these must change the tokens."""

    @pytest.fixture(params=["fused", "fused without graphs", "stock"])
    def bench(self, request: pytest.FixtureRequest, checkpoint: Path, reference: Any) -> Bench:
        return gpu_bench(checkpoint, reference, **VARIANTS[request.param])

    def outputs_differ(self, bench: Bench) -> bool:
        requests = mixed_requests(bench, 5)
        outputs = bench.run(requests)
        return any(outputs[request.request_id] != bench.expected(request) for request in requests)

    def test_wrong_cache_contents(self, bench: Bench) -> None:
        """Keys of all requests are overwritten once while they decode; the graph reads the same memory."""
        requests = mixed_requests(bench, 5, max_tokens=20)
        outputs = bench.run(requests, steps=6)
        for cache in bench.engine.runner.kv_caches:
            cache.keys.copy_(cache.keys.flip(-1))
        for number, tokens in bench.run([]).items():
            outputs[number] += tokens
        assert any(outputs[request.request_id] != bench.expected(request) for request in requests)

    def test_swapped_features(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        model = bench.engine.runner.model
        embed = model.embed_multimodal
        monkeypatch.setattr(model, "embed_multimodal", lambda **kw: [rows.flip(0) for rows in embed(**kw)])
        assert self.outputs_differ(bench)


def test_float64_is_refused(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="float64: the CUDA kernels take float32, float16 and bfloat16"):
        boot_on_gpu(checkpoint, dtype="float64")
