"""Decode attention on the GPU against float64 formulas, and what a request's result may not depend on."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from executor_service.kernels.paged_decode_attention import Variant, launch, paged_decode_attention
from executor_service.kernels.write_kv import write_kv
from tests.executor_service.gpu.tensors import DTYPES, SEEDS, close, poison

pytestmark = pytest.mark.gpu

HEADS = st.sampled_from([(1, 1), (4, 4), (32, 32), (6, 2), (32, 8), (8, 1), (12, 1), (20, 2)])
LENGTHS = st.lists(st.one_of(st.integers(0, 70), st.integers(0, 1500), st.integers(2000, 9000)), min_size=1, max_size=6)


@dataclass
class Batch:
    """Requests whose blocks are scattered over caches that hold NaN wherever no token is."""

    query: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    seq_lens: Tensor

    def attend(self, window: int = 0, softcap: float = 0.0, scale: float = 0.1) -> Tensor:
        out = torch.full_like(self.query, float("nan"))
        poison()
        paged_decode_attention(
            self.query, self.k_cache, self.v_cache, self.block_tables, self.seq_lens, scale, window, softcap, out
        )
        return out

    def formula(self, window: int = 0, softcap: float = 0.0, scale: float = 0.1) -> Tensor:
        """Softmax of scores times values, in float64, one request after the other."""
        out = torch.zeros(self.query.shape, dtype=torch.float64, device="cuda")
        repeats = self.query.shape[1] // self.k_cache.shape[2]
        for row, length in enumerate(self.seq_lens.tolist()):
            start = max(0, length - window) if window else 0
            if not length:
                continue
            rows = [cache[self.block_tables[row].long()].flatten(0, 1) for cache in (self.k_cache, self.v_cache)]
            keys, values = (r[start:length].double().repeat_interleave(repeats, 1) for r in rows)
            scores = torch.einsum("hd,thd->ht", self.query[row].double(), keys) * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            out[row] = torch.einsum("ht,thd->hd", scores.softmax(-1), values)
        return out


def make(lengths: list[int], heads: tuple[int, int], dim: int, block_size: int, dtype: torch.dtype, seed: int) -> Batch:
    """Every request's numbers depend on its own length and the seed alone."""
    needed = [-(-length // block_size) for length in lengths]
    num_blocks = sum(needed) + 3
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).cuda()
    caches = [
        torch.full((num_blocks, block_size, heads[1], dim), float("nan"), dtype=dtype, device="cuda") for _ in "kv"
    ]
    tables = order[-1].to(torch.int32).repeat(len(lengths), max(1, *needed)).contiguous()
    queries, at = [], 0
    for row, (length, count) in enumerate(zip(lengths, needed, strict=True)):
        blocks = order[at : at + count]
        at += count
        tables[row, :count] = blocks.to(torch.int32)
        numbers = torch.Generator("cuda").manual_seed(seed * 10007 + length)
        queries.append(torch.randn(heads[0], dim, generator=numbers, device="cuda"))
        places = torch.arange(length, device="cuda")
        for cache in caches:
            values = torch.randn(length, heads[1], dim, generator=numbers, device="cuda").to(dtype)
            cache[blocks[places // block_size], places % block_size] = values
    lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    return Batch(torch.stack(queries).to(dtype), *caches, tables, lens)


@settings(max_examples=60)
@given(
    LENGTHS, HEADS, st.sampled_from([64, 128]), st.sampled_from([16, 32, 64]), st.sampled_from([0, 1, 40, 1000]),
    st.sampled_from([0.0, 3.0]), st.sampled_from([torch.float16, torch.bfloat16]), SEEDS,
)  # fmt: skip
def test_streaming(lengths, heads, dim: int, block_size: int, window: int, softcap: float, dtype, seed: int) -> None:
    batch = make(lengths, heads, dim, block_size, dtype, seed)
    close(batch.attend(window, softcap), batch.formula(window, softcap))


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=4), st.sampled_from([(1, 1), (4, 4), (6, 2)]),
    st.sampled_from([1, 16, 80, 128, 256]), st.sampled_from([1, 3, 16, 24]), st.sampled_from([0, 1, 40]),
    st.sampled_from([0.0, 3.0]), DTYPES, SEEDS,
)  # fmt: skip
def test_all_shapes(lengths, heads, dim: int, block_size: int, window: int, softcap: float, dtype, seed: int) -> None:
    """Those that the streaming kernel does not take among them."""
    batch = make(lengths, heads, dim, block_size, dtype, seed)
    close(batch.attend(window, softcap), batch.formula(window, softcap))


@pytest.mark.parametrize("heads", [(32, 32), (32, 8), (2, 1)])
def test_a_request_is_answered_alike_in_every_batch(heads) -> None:
    """Bit for bit, alone or among others of any length, empty ones too."""
    lengths = [700, 2048, 63, 0, 8192, 1, 64, 65, 5000, 700]
    together = make(lengths, heads, 128, 16, torch.bfloat16, 5).attend()
    for row, length in enumerate(lengths):
        for others in ([], [3000], [0, 17, 17, 17]):
            alone = make([length, *others], heads, 128, 16, torch.bfloat16, 5).attend()
            assert torch.equal(alone[0], together[row])
    assert torch.equal(together[0], together[-1])


@pytest.mark.parametrize("heads", [(32, 32), (64, 16)])
def test_a_request_is_answered_alike_whatever_its_units_are(heads) -> None:
    """With enough work a block of threads takes several chunks in one go, except of the last requests."""
    lengths = [700, 8192, 2048, *[700] * 140, 8192, 2048, 5000, 700]
    together = make(lengths, heads, 64, 16, torch.bfloat16, 8).attend()
    for row in (0, 1, 2, len(lengths) - 2):
        alone = make([lengths[row]], heads, 64, 16, torch.bfloat16, 8).attend()
        assert torch.equal(alone[0], together[row])
        assert all(torch.equal(alone[0], together[r]) for r, length in enumerate(lengths) if length == lengths[row])


@pytest.mark.parametrize("heads", [(32, 32), (32, 8)])
def test_the_size_of_the_gpu_does_not_matter(heads) -> None:
    """Half or a third of the blocks of threads give the same bits."""
    batch = make([700, 2048, 63, 8192, 1, 300, 5000], heads, 128, 16, torch.bfloat16, 6)
    tensors = (batch.query, batch.k_cache, batch.v_cache, batch.block_tables, batch.seq_lens)
    results = []
    for stages, blocks_each in ((3, 2), (3, 1), (2, 3), (2, 1)):
        out = torch.full_like(batch.query, float("nan"))
        launch(*tensors, 0.1, 0, 0.0, out, Variant(4, stages, blocks_each))
        results.append(out)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("lengths", [[1], [17], [700], [64, 128, 1, 1025, 3000, 16]])
def test_the_newest_tokens_may_be_written_by_the_kernel_before(lengths) -> None:
    """It begins early, and reads those and the queries late: what stands there before is NaN."""
    batch = make(lengths, (8, 2), 128, 16, torch.bfloat16, 3)
    places = batch.seq_lens.long() - 1
    slots = batch.block_tables.gather(1, places[:, None] // 16)[:, 0].long() * 16 + places % 16
    rows = [cache.flatten(0, 1) for cache in (batch.k_cache, batch.v_cache)]
    key, value = (each[slots].clone() for each in rows)
    expected = batch.formula()
    ballast = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        for each in rows:
            each[slots] = float("nan")
        torch.mm(ballast, ballast)
        write_kv(key, value, batch.k_cache, batch.v_cache, slots)
        out = torch.empty_like(batch.query)
        paged_decode_attention(
            batch.query, batch.k_cache, batch.v_cache, batch.block_tables, batch.seq_lens, 0.1, 0, 0.0, out
        )
        close(out, expected)


def test_many_requests() -> None:
    """More than a warp has lanes, and than a lane has loads under way."""
    lengths = [(37 * row) % 300 for row in range(1500)]
    batch = make(lengths, (2, 1), 64, 16, torch.float16, 4)
    close(batch.attend(), batch.formula())


@pytest.mark.parametrize("size", [1, 5, 300])
def test_a_captured_graph_serves_other_lengths(size: int) -> None:
    """Nothing in the launch depends on lengths; each replay leaves the counters as it found them."""
    batch = make([800] * size, (8, 2), 128, 16, torch.bfloat16, 1)
    batch.attend()
    out = torch.empty_like(batch.query)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        paged_decode_attention(
            batch.query, batch.k_cache, batch.v_cache, batch.block_tables, batch.seq_lens, 0.1, 0, 0.0, out
        )
    for seed in range(4):
        chosen = torch.randint(0, 801, (size,), generator=torch.Generator().manual_seed(seed)).to(torch.int32)
        batch.seq_lens.copy_(chosen)
        for _ in range(3):
            out.fill_(float("nan"))
            graph.replay()
            close(out, batch.formula())


def test_float64_is_refused() -> None:
    batch = make([5], (2, 1), 16, 16, torch.float64, 0)
    with pytest.raises(TypeError, match="float64"):
        batch.attend()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    batch = make([9, 20, 0], (4, 2), 64, 16, dtype, 0)
    for cache in (batch.k_cache, batch.v_cache):
        cache.nan_to_num_()  # opcheck compares inputs before and after
    arguments = (batch.query, batch.k_cache, batch.v_cache, batch.block_tables, batch.seq_lens, 0.1, 0, 0.0)
    torch.library.opcheck(torch.ops.diptych.paged_decode_attention.default, (*arguments, torch.empty_like(batch.query)))
