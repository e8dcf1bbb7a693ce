"""Prefill attention against a float64 formula: every kernel, ragged batches, tails, garbage behind the last token."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from executor_service.kernels import paged_prefill_attention as op
from tests.executor_service.gpu.tensors import DTYPES, ERRORS, SEEDS, close, poison, random
from tests.executor_service.spans import visible_ends

pytestmark = pytest.mark.gpu

HALVES = st.sampled_from([torch.float16, torch.bfloat16])
HEADS = st.sampled_from([(1, 1), (2, 2), (4, 1), (6, 2)])
WINDOWS = st.sampled_from([0, 0, 1, 40, 128, 200])
SOFTCAPS = st.sampled_from([0.0, 0.0, 5.0])
CHUNKS = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 40), st.sampled_from([0, 63, 64, 65, 127, 128, 129, 200, 256, 320])),
        st.one_of(st.integers(0, 40), st.sampled_from([0, 0, 0, 16, 100, 128, 129, 250])),
    ),
    min_size=1,
    max_size=5,
)
"""New tokens and cached ones of each request."""
SPANS = st.booleans()


@dataclass(frozen=True)
class Batch:
    """Arguments of the op but its numbers and its output."""

    query: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    cu_seqlens: Tensor
    seq_lens: Tensor
    max_query_len: int
    visible_ends: Tensor | None

    @property
    def arguments(self) -> tuple[Tensor | int, ...]:
        """In the op's order, without `visible_ends`, which comes last there."""
        return (
            self.query, self.k_cache, self.v_cache, self.block_tables, self.cu_seqlens, self.seq_lens,
            self.max_query_len,
        )  # fmt: skip


def make_batch(chunks, heads, head_dim, block_size, dtype, seed, has_spans=False, garbage=float("nan")) -> Batch:
    """Shuffled blocks; every slot that belongs to no token holds `garbage`."""
    lengths = [new + cached for new, cached in chunks]
    widths = [-(-length // block_size) for length in lengths]
    num_blocks = sum(widths) + 2
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    tables = torch.full((len(chunks), max(widths) + 1), order[0], dtype=torch.int32)
    slots = []
    for row, length in enumerate(lengths):
        blocks = [order.pop() for _ in range(widths[row])]
        tables[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        slots += [blocks[token // block_size] * block_size + token % block_size for token in range(length)]
    caches = []
    for number in range(2):
        cache = torch.full((num_blocks * block_size, heads[1], head_dim), garbage, dtype=dtype, device="cuda")
        cache[slots] = random((len(slots), heads[1], head_dim), dtype, seed + number)
        caches.append(cache.view(num_blocks, block_size, heads[1], head_dim))
    starts = torch.tensor([0, *[new for new, _ in chunks]]).cumsum(0)
    query = 2 * random((int(starts[-1]), heads[0], head_dim), dtype, seed + 2)
    longest = max(new for new, _ in chunks)
    ends = visible_ends(chunks, seed).cuda() if has_spans else None
    return Batch(query, *caches, tables.cuda(), starts.int().cuda(), torch.tensor(lengths).int().cuda(), longest, ends)


def formula(batch: Batch, scale: float, window: int, softcap: float) -> Tensor:
    """What the op computes, request by request, in float64."""
    out = torch.zeros(batch.query.shape, dtype=torch.float64, device="cuda")
    starts = batch.cu_seqlens.tolist()
    for row, length in enumerate(batch.seq_lens.tolist()):
        query = batch.query[starts[row] : starts[row + 1]].double().transpose(0, 1)
        group = query.shape[0] // batch.k_cache.shape[2]
        keys, values = (
            cache[batch.block_tables[row].long()]
            .flatten(0, 1)[:length]
            .double()
            .transpose(0, 1)
            .repeat_interleave(group, 0)
            for cache in (batch.k_cache, batch.v_cache)
        )
        scores = query @ keys.transpose(1, 2) * scale
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        places = torch.arange(length, device="cuda")
        own = torch.arange(length - query.shape[1], length, device="cuda")[:, None]
        seen = places <= own
        if batch.visible_ends is not None:
            seen = places < batch.visible_ends[starts[row] : starts[row + 1], None]
        if window:
            seen &= places > own - window
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out[starts[row] : starts[row + 1]] = (weights @ values).transpose(0, 1)
    return out


def check(batch: Batch, scale: float, window: int, softcap: float, launch=None) -> None:
    """The op, or one kernel of it, into a poisoned output that has a row more than the batch."""
    whole = torch.full((len(batch.query) + 1, *batch.query.shape[1:]), float("nan"), dtype=batch.query.dtype).cuda()
    whole[-1] = 7
    out = whole[:-1]
    poison()
    if launch is None:
        op.paged_prefill_attention(*batch.arguments, scale, window, softcap, out, batch.visible_ends)
    else:
        *tensors, longest = batch.arguments
        ends = 0 if batch.visible_ends is None else batch.visible_ends
        launch((*tensors, out), (len(batch.seq_lens), longest), (scale, window, softcap, ends))
    close(out, formula(batch, scale, window, softcap))
    assert (whole[-1] == 7).all(), "written behind the end"


@settings(max_examples=40)
@given(CHUNKS, HEADS, st.sampled_from([4, 16, 40, 64, 80, 128, 160]), st.sampled_from([1, 16, 24]), SPANS, WINDOWS,
       SOFTCAPS, DTYPES, SEEDS)  # fmt: skip
def test_any_shape(chunks, heads, head_dim, block_size, has_spans, window, softcap, dtype, seed) -> None:
    chunks = [(new % 50, cached) for new, cached in chunks]
    if any(new for new, _ in chunks):
        batch = make_batch(chunks, heads, head_dim, block_size, dtype, seed, has_spans)
        check(batch, head_dim**-0.5, window, softcap)


@settings(max_examples=60)
@given(CHUNKS, HEADS, st.sampled_from([64, 128]), st.sampled_from([1, 8, 16, 24, 64, 256]), SPANS, WINDOWS, SOFTCAPS,
       HALVES, SEEDS)  # fmt: skip
def test_mma(chunks, heads, head_dim, block_size, has_spans, window, softcap, dtype, seed) -> None:
    if any(new for new, _ in chunks):
        batch = make_batch(chunks, heads, head_dim, block_size, dtype, seed, has_spans)
        check(batch, head_dim**-0.5, window, softcap, op._mma(dtype, head_dim, has_spans))


@pytest.fixture(scope="module")
def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma exists on GPUs of compute capability 9.0 alone")


@pytest.mark.usefixtures("hopper")
@settings(max_examples=100)
@given(CHUNKS, HEADS, st.sampled_from([64, 128]), st.sampled_from([8, 16, 32, 128, 256]), SPANS, WINDOWS, SOFTCAPS,
       HALVES, SEEDS)  # fmt: skip
def test_wgmma(chunks, heads, head_dim, block_size, has_spans, window, softcap, dtype, seed) -> None:
    if any(new for new, _ in chunks):
        batch = make_batch(chunks, heads, head_dim, block_size, dtype, seed, has_spans)
        check(batch, head_dim**-0.5, window, softcap, op._wgmma(0, dtype, head_dim, has_spans))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("block_size", [16, 24])
@pytest.mark.parametrize("has_spans", [False, True])
def test_many_tiles_for_every_processor(block_size: int, has_spans: bool) -> None:
    """More tiles than processors several times over, more than 32 requests, and the same again with what is left."""
    chunks = [(300, 0), (0, 5), (129, 700), (1, 0)] * 11
    batch = make_batch(chunks, (8, 2), 128, block_size, torch.bfloat16, 3, has_spans)
    for _ in range(3):
        check(batch, 0.1, 0, 0.0)


@pytest.mark.parametrize(("head_dim", "dtype"), [(128, torch.bfloat16), (64, torch.float16), (96, torch.bfloat16)])
@pytest.mark.parametrize("window", [0, 100, 1000])
def test_spans_are_seen_to_their_end(head_dim: int, dtype: torch.dtype, window: int) -> None:
    """A picture over several tiles of queries and keys: all but its last token see more, and nothing before it does."""
    chunks = [(700, 0), (650, 37)]
    batch = make_batch(chunks, (4, 2), head_dim, 16, dtype, 9)
    causal = torch.empty_like(batch.query)
    op.paged_prefill_attention(*batch.arguments, 0.1, window, 0.0, causal)
    ends = torch.cat([torch.arange(cached + 1, cached + new + 1) for new, cached in chunks])
    ends[30:606], ends[700 + 1 : 700 + 577] = 606, 37 + 577
    batch = replace(batch, visible_ends=ends.int().cuda())
    check(batch, 0.1, window, 0.0)
    out = torch.empty_like(batch.query)
    op.paged_prefill_attention(*batch.arguments, 0.1, window, 0.0, out, batch.visible_ends)
    differs = (out != causal).flatten(1).any(1)
    assert differs[30:605].all()
    assert not differs[:30].any()


def test_large_scores_do_not_overflow() -> None:
    batch = make_batch([(150, 10)], (2, 1), 64, 16, torch.float16, 5)
    check(batch, 3.0, 0, 0.0)
    check(batch, 3.0, 0, 30.0)


@pytest.mark.parametrize("has_spans", [False, True])
def test_captured_in_a_graph(has_spans: bool) -> None:
    batch = make_batch([(200, 0), (130, 37)], (4, 4), 128, 16, torch.bfloat16, 6, has_spans)
    out = torch.empty_like(batch.query)
    numbers = (0.09, 0, 0.0)
    op.paged_prefill_attention(*batch.arguments, *numbers, out, batch.visible_ends)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        op.paged_prefill_attention(*batch.arguments, *numbers, out, batch.visible_ends)
    for _ in range(3):
        out.fill_(float("nan"))
        batch.query.copy_(batch.query.flip(0))
        graph.replay()
        close(out, formula(batch, *numbers))


@pytest.mark.parametrize("dtype", list(ERRORS))
def test_opcheck(dtype: torch.dtype) -> None:
    batch = make_batch([(5, 0), (20, 9)], (4, 2), 64, 16, dtype, 0, has_spans=True)
    for ends in (None, batch.visible_ends):
        torch.library.opcheck(
            torch.ops.diptych.paged_prefill_attention.default,
            (*batch.arguments, 0.125, 0, 0.0, torch.empty_like(batch.query), ends),
        )


def test_float64_is_refused() -> None:
    batch = make_batch([(5, 0)], (1, 1), 16, 16, torch.float64, 0)
    with pytest.raises(TypeError, match="float64"):
        op.paged_prefill_attention(*batch.arguments, 0.25, 0, 0.0, torch.empty_like(batch.query))
