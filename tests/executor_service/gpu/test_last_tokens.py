"""The last layer for the tokens that are asked about, on the GPU: as large as kernels that overlap need to go wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from executor_service.layers.context import AttentionMetadata, KVCache, forward_context
from executor_service.models.fused import FusedDecoder

pytestmark = pytest.mark.gpu

HEADS, KV_HEADS, DIM, LAYERS = 8, 4, 128, 2
LENGTHS, CHUNKS = (500, 33, 900, 640, 2000, 17), (1, 1, 700, 640, 400, 17)
BLOCK_SIZE, NUM_BLOCKS = 16, 300
STALE = 100.0
"""What the cache has where nothing was written: attention that reads too early is far off."""
ERRORS = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@pytest.fixture(scope="module", params=list(ERRORS), ids=str)
def decoder(request: pytest.FixtureRequest) -> FusedDecoder:
    config = LlamaConfig(
        hidden_size=HEADS * DIM, intermediate_size=3072, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, vocab_size=32, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = LlamaModel(config).to("cuda", request.param).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(0, parameter.shape[1] ** -0.5)
    found = FusedDecoder.of(model)
    assert found is not None
    return found


def batch(dtype: torch.dtype) -> tuple[AttentionMetadata, Tensor, list[KVCache]]:
    """Decodes, whole prompts and chunks; places, and caches that have what earlier steps wrote."""
    generator = torch.Generator().manual_seed(0)
    width = -(-max(LENGTHS) // BLOCK_SIZE)
    tables, free = torch.zeros(len(LENGTHS), width, dtype=torch.int64), torch.randperm(NUM_BLOCKS, generator=generator)
    for row, length in enumerate(LENGTHS):
        count = -(-length // BLOCK_SIZE)
        tables[row, :count], free = free[:count], free[count:]
    places = torch.cat([torch.arange(end - size, end) for end, size in zip(LENGTHS, CHUNKS, strict=True)])
    rows = torch.repeat_interleave(torch.arange(len(CHUNKS)), torch.tensor(CHUNKS))
    slots = tables[rows, places // BLOCK_SIZE] * BLOCK_SIZE + places % BLOCK_SIZE
    starts = torch.tensor([0, *torch.tensor(CHUNKS).cumsum(0)], dtype=torch.int32)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    metadata = AttentionMetadata(
        slots.cuda(), starts.cuda(), lengths.cuda(), tables.to(torch.int32).cuda(), num_decodes=2,
        max_query_len=max(CHUNKS),
    )  # fmt: skip
    caches = []
    for _ in range(LAYERS):
        pair = torch.randn(2, NUM_BLOCKS * BLOCK_SIZE, KV_HEADS, DIM, generator=generator)
        pair[:, slots] = STALE
        caches.append(KVCache(*pair.unflatten(1, (NUM_BLOCKS, BLOCK_SIZE)).to("cuda", dtype)))
    return metadata, places.cuda(), caches


@torch.inference_mode()
def run(decoder: FusedDecoder, requests: Tensor | None) -> tuple[Tensor, list[KVCache]]:
    """Hidden states and caches of random embeddings."""
    dtype = decoder._next_norms[-1].weight.dtype
    metadata, places, caches = batch(dtype)
    embeddings = torch.randn(len(places), HEADS * DIM, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    with forward_context(metadata, caches):
        return decoder(embeddings, places, requests), caches


@pytest.mark.parametrize("asked", [[0, 1, 2, 3, 4, 5], [0, 1, 3, 5], [4], []], ids=str)
def test_last_tokens(decoder: FusedDecoder, asked: list[int]) -> None:
    everything, caches = run(decoder, None)
    allowed = ERRORS[everything.dtype]
    expected = everything[torch.tensor(CHUNKS).cumsum(0)[asked] - 1]
    requests = torch.tensor(asked, dtype=torch.int64, device="cuda")
    for _ in range(5):
        states, written = run(decoder, requests)
        assert states.shape == expected.shape
        if asked:
            assert relative(states, expected) < allowed
        for one, other in zip(written, caches, strict=True):
            assert relative(one.keys, other.keys) < allowed
            assert relative(one.values, other.values) < allowed


def relative(one: Tensor, other: Tensor) -> float:
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


def test_a_stale_cache_would_be_seen(decoder: FusedDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the same comparison when the last layer's keys and values come too late."""
    everything, _ = run(decoder, None)
    requests = torch.arange(len(CHUNKS), device="cuda")
    write = decoder._rotary_write_kv
    queries = HEADS * DIM

    def forget(qkv: Tensor, positions: Tensor, cos_sin: Tensor, *cache_and_slots: Tensor) -> Tensor:
        *cache, slots = cache_and_slots
        without_queries = qkv.shape[1] < queries + 2 * KV_HEADS * DIM
        return write(qkv, positions, cos_sin, *cache, slots.new_full(slots.shape, -1) if without_queries else slots)

    monkeypatch.setattr(decoder, "_rotary_write_kv", forget)
    states, _ = run(decoder, requests)
    assert relative(states, everything[torch.tensor(CHUNKS).cumsum(0) - 1]) > 10 * ERRORS[everything.dtype]
