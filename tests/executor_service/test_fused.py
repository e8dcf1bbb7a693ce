"""The fused decoder: a twin of the stock one, in the same memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import AutoConfig

from executor_service.engine.boot import boot
from executor_service.engine.messages import EngineConfig
from executor_service.layers.context import AttentionMetadata, KVCache, forward_context
from executor_service.layers.linear import GatedLinear
from executor_service.models import fused
from executor_service.models.fused import PACK_ALIGNMENT, FusedDecoder, pack_linears
from executor_service.models.protocol import kv_geometry
from registry.errors import CheckpointError
from tests.checkpoints import make_llava_checkpoint, random_weights, write_json, write_weights
from tests.executor_service.conftest import Bench, boot_engine, load_reference
from tests.executor_service.test_engine_tokens import mixed_requests
from tests.plugins.checkpoints import make_patchwork

LENGTHS, CHUNKS = (9, 30, 17), (1, 30, 6)
BLOCK_SIZE, NUM_BLOCKS = 4, 40


@pytest.fixture(params=["llama", "mistral", "qwen2"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    checkpoint = make_llava_checkpoint(tmp_path / "model", language=request.param, sliding_window=7)
    return boot_engine(checkpoint, decoder="stock").engine.runner.model


def batch(seed: int) -> tuple[AttentionMetadata, torch.Tensor, torch.Tensor]:
    """A decode, a whole prompt and a chunk with random embeddings and shuffled blocks; and their positions."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randperm(NUM_BLOCKS, generator=generator)[: 3 * 8].view(3, 8)
    places = torch.cat([torch.arange(end - size, end) for end, size in zip(LENGTHS, CHUNKS, strict=True)])
    rows = torch.repeat_interleave(torch.arange(3), torch.tensor(CHUNKS))
    metadata = AttentionMetadata(
        slot_mapping=blocks[rows, places // BLOCK_SIZE] * BLOCK_SIZE + places % BLOCK_SIZE,
        cu_seqlens=torch.tensor([0, *torch.tensor(CHUNKS).cumsum(0)], dtype=torch.int32),
        seq_lens=torch.tensor(LENGTHS, dtype=torch.int32),
        block_tables=blocks.to(torch.int32),
        num_decodes=1,
        max_query_len=max(CHUNKS),
    )
    return metadata, torch.randn(sum(CHUNKS), 64, generator=generator, dtype=torch.float64), places


def run(model: Any, seed: int, requests: torch.Tensor | None = None) -> tuple[torch.Tensor, list[KVCache]]:
    """Hidden states, of all tokens or `requests`' last ones, and the caches that were written."""
    metadata, embeddings, places = batch(seed)
    generator = torch.Generator().manual_seed(1)
    geometry = kv_geometry(model, model.hf.config.text_config)
    shape = (NUM_BLOCKS, BLOCK_SIZE, geometry.num_kv_heads, geometry.head_dim)
    caches = [KVCache(*(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in "kv")) for _ in range(2)]
    with torch.inference_mode(), forward_context(metadata, caches):
        return model(torch.zeros(len(places), dtype=torch.int64), places, embeddings, requests), caches


def test_twins(model: Any) -> None:
    check_twins(model)
    assert not torch.allclose(run(model, 1)[0], run(model, 0)[0])


def check_twins(model: Any) -> None:
    """Of a model that is not fused yet: the same hidden states, keys and values."""
    stock, stock_caches = run(model, 0)
    assert model.fuse_decoder()
    fused, fused_caches = run(model, 0)
    torch.testing.assert_close(fused, stock, atol=1e-6, rtol=1e-6)
    for one, other in zip(fused_caches, stock_caches, strict=True):
        torch.testing.assert_close(one.keys, other.keys, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(one.values, other.values, atol=1e-6, rtol=1e-6)


def with_head_dim(checkpoint: Path, head_dim: int) -> Path:
    """The checkpoint with heads of that size, and weights of their own, whatever its hidden size is."""
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["head_dim"] = head_dim
    write_json(checkpoint / "config.json", config)
    write_weights(checkpoint, random_weights(AutoConfig.from_pretrained(checkpoint), 0), "new", 1)
    return checkpoint


@pytest.mark.parametrize("head_dim", [8, 24])
@pytest.mark.parametrize("language", ["llama", "mistral", "qwen2"])
def test_heads_that_do_not_make_up_the_hidden_size(
    tmp_path: Path, language: Literal["llama", "mistral", "qwen2"], head_dim: int
) -> None:
    """As Mistral-Nemo has them: less or more than the 64 of the hidden states; twins, and transformers' own tokens."""
    made = make_llava_checkpoint(tmp_path / "model", language=language, sliding_window=7)
    checkpoint = with_head_dim(made, head_dim)
    model = boot_engine(checkpoint, decoder="stock").engine.runner.model
    attention = model.hf.model.language_model.layers[0].self_attn
    assert (attention.q_proj.out_features, attention.o_proj.out_features) == (4 * head_dim, 64)
    check_twins(model)
    last, _ = run(model, 0, torch.tensor([0, 2]))
    torch.testing.assert_close(last, run(model, 0)[0][[0, -1]], atol=1e-12, rtol=1e-12)
    bench = Bench(checkpoint, boot_engine(checkpoint, decoder="fused"), load_reference(checkpoint))
    requests = mixed_requests(bench, 4)
    outputs = bench.run(requests)
    for request in requests:
        assert outputs[request.request_id] == bench.expected(request)


def test_the_stock_decoder_goes_on_in_the_same_memory(model: Any) -> None:
    before, _ = run(model, 0)
    num_bytes = sum(p.untyped_storage().nbytes() for p in unique_storages(model.hf.model.language_model))
    assert model.fuse_decoder()
    assert sum(p.untyped_storage().nbytes() for p in unique_storages(model.hf.model.language_model)) == num_bytes
    layer = model.hf.model.language_model.layers[0]
    merged = model.fused_decoder._layers[0].qkv.weight
    assert layer.self_attn.k_proj.weight.untyped_storage().data_ptr() == merged.untyped_storage().data_ptr()
    model.fused_decoder = None
    after, _ = run(model, 0)
    assert torch.equal(after, before)


def unique_storages(model: Any) -> list[torch.Tensor]:
    return list({p.untyped_storage().data_ptr(): p for p in model.parameters()}.values())


def test_the_residual_stream_begins_with_the_embeddings(model: Any) -> None:
    """In their own memory: of a long step's tensors that is one less at its peak."""
    assert model.fuse_decoder()
    metadata, embeddings, places = batch(0)
    before = embeddings.clone()
    shape = (NUM_BLOCKS, BLOCK_SIZE, 2, 16)
    caches = [KVCache(*(torch.zeros(shape, dtype=torch.float64) for _ in "kv")) for _ in range(2)]
    with torch.inference_mode(), forward_context(metadata, caches):
        hidden = model(places, places, embeddings)
    norm = model.hf.model.language_model.norm
    assert not torch.equal(embeddings, before)
    assert torch.equal(norm(embeddings), hidden)


def test_other_shapes_are_not_taken(model: Any) -> None:
    decoder = model.hf.model.language_model
    decoder.config.hidden_act = "gelu"
    assert FusedDecoder.of(decoder) is None

    class Other(type(decoder)):
        """A subclass may compute anything."""

    decoder.config.hidden_act = "silu"
    decoder.__class__ = Other
    assert FusedDecoder.of(decoder) is None


def test_what_cannot_be_fused_must_not_be_asked_for(tmp_path: Path) -> None:
    config = EngineConfig(model_dir=make_patchwork(tmp_path), plugins=("tests.plugins.patchwork",), decoder="fused")
    with pytest.raises(CheckpointError, match=r"--decoder fused: .* has no decoder of a shape .*use --decoder auto"):
        boot(config, lambda progress: None)


def test_a_layers_matrices_lie_together(model: Any) -> None:
    """In one piece of memory, each where the allocator would have it begin, and nothing else in it."""
    assert model.fuse_decoder()
    for layer in model.hf.model.language_model.layers:
        weights = [module.weight for module in layer.modules() if isinstance(module, torch.nn.Linear)]
        assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
        assert weights[0].untyped_storage().nbytes() == sum(weight.nbytes for weight in weights)
    for layer in model.fused_decoder._layers:
        for linear in (layer.qkv, layer.output, layer.gate_up, layer.down):
            assert linear.weight.storage_offset() % PACK_ALIGNMENT == 0


def test_matrices_of_odd_sizes_do_not_overlap() -> None:
    linears = [torch.nn.Linear(5, out) for out in (3, 2, 7)]
    before = [(linear.weight.clone(), linear.bias.clone()) for linear in linears]
    (first, bias), (second, _) = pack_linears(linears[:2], linears[2:])
    assert torch.equal(first, torch.cat([before[0][0], before[1][0]]))
    assert torch.equal(bias, torch.cat([before[0][1], before[1][1]]))
    assert torch.equal(second, before[2][0])
    assert second.storage_offset() == PACK_ALIGNMENT
    assert all(torch.equal(linear.weight, weight) for linear, (weight, _) in zip(linears, before, strict=True))


@pytest.mark.parametrize(("limit", "slices"), [(37, [37]), (36, [19, 18]), (13, [13, 13, 11]), (12, [10, 10, 10, 7])])
def test_the_mlp_in_slices(model: Any, monkeypatch: pytest.MonkeyPatch, limit: int, slices: list[int]) -> None:
    """Even ones of at most so many rows, and the same hidden states."""
    assert model.fuse_decoder()
    whole, _ = run(model, 0)
    seen: list[int] = []
    gate_up = GatedLinear.__call__

    def counted(self: GatedLinear, x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return gate_up(self, x)

    monkeypatch.setattr(GatedLinear, "__call__", counted)
    monkeypatch.setattr(fused, "MAX_MLP_ROWS", limit)
    sliced, _ = run(model, 0)
    assert seen == slices * len(model.fused_decoder._layers)
    torch.testing.assert_close(sliced, whole, atol=1e-12, rtol=1e-12)
