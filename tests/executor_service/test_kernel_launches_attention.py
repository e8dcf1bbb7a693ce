"""Launches of attention over the paged KV cache, held to what the kernels' sources say."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from executor_service.kernels import paged_decode_attention as decode
from executor_service.kernels import paged_prefill_attention as prefill
from tests.executor_service.compiled_kernels import constants
from tests.executor_service.host_kernels import needs_compiler
from tests.executor_service.launch_recorder import (
    A100,
    B200,
    COUNTERS,
    GPUS,
    H100,
    H200,
    L40,
    Gpu,
    Launch,
    TensorMap,
    covers,
    meta,
    recorded,
    recorded_launch,
)

pytestmark = needs_compiler
HALVES = [torch.float16, torch.bfloat16]
LOG2E = math.log2(math.e)
SCALE, WINDOW = 0.125, 40
gpus = st.sampled_from(GPUS)
groups = st.integers(1, 20)
batches = st.one_of(st.integers(1, 9), st.integers(1, 4096))


def ints(*shape: int) -> Tensor:
    return meta(*shape, dtype=torch.int32)


def paged(dtype: torch.dtype, kv_heads: int, dim: int, block_size: int) -> list[Tensor]:
    """Caches of 20 blocks."""
    return [meta(20, block_size, kv_heads, dim, dtype=dtype) for _ in "kv"]


# --- decode -------------------------------------------------------------------------------------------


def decoded(
    dtype: torch.dtype, batch: int, group: int, kv_heads: int, dim: int, block_size: int, width: int = 12,
    softcap: float = 0.0, gpu: Gpu = H100, variant: decode.Variant | None = None,
) -> Launch:  # fmt: skip
    """A launch whose block tables have rows that are longer than they are wide."""
    query, caches = meta(batch, group * kv_heads, dim, dtype=dtype), paged(dtype, kv_heads, dim, block_size)
    tables, lengths, out = ints(batch, width + 3)[:, :width], ints(batch), torch.empty_like(query)
    arguments = query, *caches, tables, lengths, SCALE, WINDOW, softcap, out, variant
    launch = recorded_launch(decode.launch, *arguments, gpu=gpu)
    names = ("query", "keys", "values", "block_tables", "lengths", "out")
    for name, tensor in zip(names, (query, *caches, tables, lengths, out), strict=True):
        assert launch[name] is tensor
    assert (launch["table_stride"], launch["window"], launch["num_kv_heads"]) == (width + 3, WINDOW, kv_heads)
    check_scores(launch, softcap)
    return launch


def check_scores(launch: Launch, softcap: float) -> None:
    """`softcap * tanh(scale * score)`, or `scale * score` where that is 0, has to be a power of two."""
    for score in (-3.0, 0.0, 0.1, 50.0):
        expected = LOG2E * (softcap * math.tanh(SCALE * score / softcap) if softcap else SCALE * score)
        capped = launch["softcap"] * math.tanh(launch["scale"] * score)
        assert capped * bool(softcap) + launch["scale"] * score * (not softcap) == pytest.approx(expected)
    assert bool(launch["softcap"]) == bool(softcap)


def most_units(num_tokens: int, num_warps: int) -> int:
    """Of a request and pass, when each chunk is one: `bits_of` in csrc/paged_decode_attention_units.cuh."""
    known, tiles = constants("paged_decode_attention"), -(-num_tokens // (16 * num_warps))
    even = max(2 * tiles // known["kLeastHalves"], 1).bit_length() - 1
    needed = (tiles - 1 >> known["kChunkBits"]).bit_length()
    return 1 << max(min(even, known["kMostBits"]), needed)


@given(
    st.sampled_from(HALVES), batches, groups, st.integers(1, 12), st.sampled_from([64, 128]), st.integers(4, 9),
    st.one_of(st.integers(1, 40), st.integers(1, 3000)), st.sampled_from([0.0, 30.0]), gpus,
)  # fmt: skip
def test_streaming_decode(
    dtype: torch.dtype,
    batch: int,
    group: int,
    kv_heads: int,
    dim: int,
    shift: int,
    width: int,
    softcap: float,
    gpu: Gpu,
) -> None:
    known = constants("paged_decode_attention")
    batch = min(batch, known["kMaxItems"] // (kv_heads * -(-group // known["kHeads"])))
    launch = decoded(dtype, batch, group, kv_heads, dim, 1 << shift, width, softcap, gpu)
    _, of_dim, num_warps, num_stages = launch.kernel.template
    assert of_dim == dim
    assert launch.block == 32 * (num_warps + 1)
    numbers = [launch[name] for name in ("batch", "group", "passes", "block_shift")]
    assert numbers == [batch, group, kv_heads * -(-group // known["kHeads"]), shift]
    units = batch * launch["passes"] * most_units(width << shift, num_warps)
    assert launch["partials"].numel() == units * min(known["kHeads"], group) * (dim + 4)
    assert launch["partials"].dtype == torch.float32
    assert launch.shared_bytes == num_warps * num_stages * 2 * 16 * 2 * dim
    each = blocks_of_a_multiprocessor(launch, gpu)
    assert launch.grid == (min(units, gpu.multiprocessors * each), 1, 1)


def blocks_of_a_multiprocessor(launch: Launch, gpu: Gpu) -> int:
    """Two if they fit, beside 1 KiB that a GPU has of each and the kernel's `Board`: units, blocks and sums."""
    known, num_warps = constants("paged_decode_attention"), launch.kernel.template[2]
    board = known["kUnitsKept"] * 64 + known["kTablesKept"] * num_warps * known["kMostTiles"] * 4
    board += 2 * num_warps * known["kHeads"] * 4 + 256
    return 2 if 2 * (launch.shared_bytes + board + 1024) <= gpu.shared_of_multiprocessor else 1


@pytest.mark.parametrize("num_tokens", [(1 << power) + more for power in range(4, 19) for more in (-1, 0, 1)])
def test_there_is_room_for_every_chunk(num_tokens: int) -> None:
    """Also at the lengths where there are twice as many."""
    assert decode.Variant(4, 2, 1).max_chunks(num_tokens) == most_units(num_tokens, 4)


def test_decode_blocks_share_a_multiprocessor_where_they_fit() -> None:
    blocks = {
        (gpu, dim): decoded(torch.bfloat16, 99, 4, 8, dim, 16, 999, gpu=gpu).grid[0] // gpu.multiprocessors
        for gpu in (H100, A100, L40)
        for dim in (64, 128)
    }
    assert blocks == {**dict.fromkeys(blocks, 2), (L40, 128): 1}


@pytest.mark.parametrize("variant", [decode.Variant(4, 2, 1), decode.Variant(4, 3, 2), decode.Variant(4, 3, 1)])
@pytest.mark.parametrize("dim", [64, 128])
def test_a_benchmark_gets_its_variant(variant: decode.Variant, dim: int) -> None:
    launch = decoded(torch.bfloat16, 99, 4, 8, dim, 16, 999, variant=variant)
    assert launch.kernel.template[1:] == (dim, variant.num_warps, variant.num_stages)
    assert launch.grid[0] == variant.blocks_each * H100.multiprocessors
    assert launch.shared_bytes == variant.num_warps * variant.num_stages * 2 * 16 * 2 * dim


@given(
    st.sampled_from([torch.float32, *HALVES]), batches, groups, st.integers(1, 12),
    st.sampled_from([1, 40, 63, 64, 80, 96, 128, 256]), st.sampled_from([1, 3, 4, 8, 15, 16, 24, 32, 48]),
    st.sampled_from([0.0, 30.0]),
)  # fmt: skip
def test_decode_streams_what_its_kernel_can_take(
    dtype: torch.dtype, batch: int, group: int, kv_heads: int, dim: int, block_size: int, softcap: float
) -> None:
    """16-bit elements, compiled heads, blocks of a power of two that a warp's 16 tokens lie in."""
    launch = decoded(dtype, batch, group, kv_heads, dim, block_size, softcap=softcap)
    is_streamed = dtype != torch.float32 and dim in {64, 128} and block_size in {16, 32}
    assert ("partials" in launch.arguments) == is_streamed
    if is_streamed:
        return
    assert launch.grid == (batch, group * kv_heads, 1)
    assert launch.block == 32 * constants("paged_decode_attention")["kGeneralWarps"]
    numbers = [launch[name] for name in ("num_heads", "head_dim", "block_size")]
    assert numbers == [group * kv_heads, dim, block_size]


@pytest.mark.parametrize(("dtype", "dim", "block_size", "is_streamed"), [
    (torch.float16, 64, 16, True), (torch.bfloat16, 128, 64, True), (torch.float32, 64, 16, False),
    (torch.float16, 96, 16, False), (torch.float16, 64, 8, False), (torch.float16, 64, 24, False),
])  # fmt: skip
def test_what_decode_streams(dtype: torch.dtype, dim: int, block_size: int, is_streamed: bool) -> None:
    assert ("partials" in decoded(dtype, 3, 2, 2, dim, block_size).arguments) == is_streamed


def test_decode_streams_no_more_items_than_have_a_counter() -> None:
    """An item is a request and up to eight query heads of a KV head."""
    most = constants("paged_decode_attention")["kMaxItems"]
    for group, kv_heads in ((8, 8), (9, 4), (16, 4)):
        assert "partials" in decoded(torch.bfloat16, most // 8, group, kv_heads, 64, 16, 3).arguments
        assert "partials" not in decoded(torch.bfloat16, most // 8 + 1, group, kv_heads, 64, 16, 3).arguments


def test_decode_says_what_heads_it_does_not_take() -> None:
    widest = 32 * constants("paged_decode_attention")["kMaxParts"]
    assert decoded(torch.float16, 2, 1, 1, widest, 16)
    with pytest.raises(ValueError, match=f"at most {widest}, not of {widest + 1}"):
        decoded(torch.float16, 2, 1, 1, widest + 1, 16)


# --- prefill ------------------------------------------------------------------------------------------


def prefilled(
    dtype: torch.dtype, requests: int, longest: int, group: int, kv_heads: int, dim: int, block_size: int,
    has_spans: bool = False, softcap: float = 0.0, gpu: Gpu = H100,
) -> Launch:  # fmt: skip
    query, caches = meta(longest + 7, group * kv_heads, dim, dtype=dtype), paged(dtype, kv_heads, dim, block_size)
    tables, starts, lengths = ints(requests, 15)[:, :12], ints(requests + 1), ints(requests)
    out, ends = torch.empty_like(query), ints(longest + 7) if has_spans else None
    arguments = query, *caches, tables, starts, lengths, longest, SCALE, WINDOW, softcap, out, ends
    launch = recorded_launch(prefill._cuda, *arguments, gpu=gpu)
    tensors = {"query": query, "block_tables": tables, "cu_seqlens": starts, "seq_lens": lengths, "out": out}
    if "k_cache" in launch.arguments:
        tensors |= {"k_cache": caches[0], "v_cache": caches[1]}
    assert all(launch[name] is tensor for name, tensor in tensors.items())
    assert launch["visible_ends"] is ends if has_spans else launch["visible_ends"] == 0
    numbers = [launch[name] for name in ("table_stride", "num_kv_heads", "scale", "window", "softcap")]
    assert numbers == [15, kv_heads, SCALE, WINDOW, softcap]
    return launch


requests_of, longest_of = st.integers(1, 300), st.one_of(st.integers(1, 300), st.integers(1, 9000))
tensor_core_dims = st.sampled_from([64, 128])


@given(
    st.sampled_from([torch.float32, *HALVES]), requests_of, longest_of, groups, st.integers(1, 12),
    st.sampled_from([32, 64, 80, 128, 256]), st.integers(1, 300), st.booleans(), st.sampled_from([0.0, 30.0]), gpus,
)  # fmt: skip
def test_prefill_of_any_kind(
    dtype: torch.dtype, requests: int, longest: int, group: int, kv_heads: int, dim: int, block_size: int,
    has_spans: bool, softcap: float, gpu: Gpu,
) -> None:  # fmt: skip
    """Without tensor cores where these do not take the elements or heads: a warp for each query and head."""
    launch = prefilled(dtype, requests, longest, group, kv_heads, dim, block_size, has_spans, softcap, gpu)
    is_general = launch.kernel.source == "paged_prefill_attention"
    assert is_general == (dtype == torch.float32 or dim not in {64, 128})
    if not is_general:
        return
    warps = constants(launch.kernel.source)["kWarps"]
    assert launch.grid[1:] == (group * kv_heads, requests)
    assert covers(launch.grid[0], warps, longest)
    assert (launch.block, launch["head_dim"], launch["block_size"]) == (32 * warps, dim, block_size)


@given(
    st.sampled_from(HALVES), requests_of, longest_of, groups, st.integers(1, 12), tensor_core_dims,
    st.integers(1, 300), st.booleans(), st.sampled_from([A100, B200, L40]),
)  # fmt: skip
def test_prefill_with_tensor_cores(
    dtype: torch.dtype, requests: int, longest: int, group: int, kv_heads: int, dim: int, block_size: int,
    has_spans: bool, gpu: Gpu,
) -> None:  # fmt: skip
    launch = prefilled(dtype, requests, longest, group, kv_heads, dim, block_size, has_spans, gpu=gpu)
    known = constants("paged_prefill_attention_mma")
    assert launch.kernel.source == "paged_prefill_attention_mma"
    assert launch.kernel.template[1:] == (dim, has_spans)
    assert (launch.block, launch["block_size"]) == (known["kThreads"], block_size)
    assert launch.grid[::2] == (group * kv_heads, requests)
    assert covers(launch.grid[1], known["kRows"], longest)
    # Queries, and two tiles of keys and of values.
    assert launch.shared_bytes == (known["kRows"] + 2 * 2 * known["kKeys"]) * dim * 2


@given(
    st.sampled_from(HALVES), requests_of, longest_of, groups, st.integers(1, 12), tensor_core_dims,
    st.integers(3, 9).map(lambda shift: 1 << shift), st.booleans(), st.sampled_from([H100, H200]),
)  # fmt: skip
def test_prefill_on_hopper(
    dtype: torch.dtype, requests: int, longest: int, group: int, kv_heads: int, dim: int, block_size: int,
    has_spans: bool, gpu: Gpu,
) -> None:  # fmt: skip
    """A block for each multiprocessor, but none for which there is certainly no tile of queries."""
    launch = prefilled(dtype, requests, longest, group, kv_heads, dim, block_size, has_spans, gpu=gpu)
    known, heads = constants("paged_prefill_attention_wgmma"), group * kv_heads
    assert launch.kernel.source == "paged_prefill_attention_wgmma"
    assert launch.kernel.name.endswith(f"_{dim}" + "_spans" * has_spans)
    assert (launch.block, launch["block_size"]) == (known["kThreads"], block_size)
    assert (launch["num_requests"], launch["num_heads"]) == (requests, heads)
    tiles = -(-longest // known["kRows"])
    assert launch.grid == (min(gpu.multiprocessors, requests * tiles * heads), 1, 1)
    assert shared_of_wgmma(dim) <= launch.shared_bytes < shared_of_wgmma(dim) + 1024


@pytest.mark.parametrize(("longest", "blocks"), [(1, 6), (128, 6), (129, 12), (1408, 66), (1409, 72), (9000, 132)])
def test_prefill_of_few_queries_has_a_block_for_each_tile(longest: int, blocks: int) -> None:
    """Of three requests with two heads each."""
    assert prefilled(torch.bfloat16, 3, longest, 2, 1, 64, 16).grid[0] == blocks


def shared_of_wgmma(dim: int) -> int:
    """`Shared`: tiles of queries, keys and values, barriers, two `Work` of eight words; and what aligning takes."""
    known = constants("paged_prefill_attention_wgmma")
    tiles = (known["kSlots"] + 2 * known["kStages"]) * 128 * dim * 2
    num_barriers = 3 * known["kSlots"] + 4 * known["kStages"] + 2
    return tiles + -(-8 * num_barriers // 16) * 16 + known["kSlots"] * 32 + 1023


@pytest.mark.parametrize(("gpu", "source"), [(H100, "wgmma"), (B200, "mma"), (A100, "mma"), (L40, "mma")])
def test_only_hopper_has_its_instructions(gpu: Gpu, source: str) -> None:
    launch = prefilled(torch.bfloat16, 3, 200, 2, 2, 64, 16, gpu=gpu)
    assert launch.kernel.source == f"paged_prefill_attention_{source}"


@pytest.mark.parametrize(("block_size", "source"), [
    *((size, "wgmma") for size in (8, 16, 32, 64, 128, 256)), *((size, "mma") for size in (1, 2, 4, 7, 9, 12, 24, 96)),
])  # fmt: skip
def test_only_blocks_of_whole_boxes_are_brought_by_tensor_maps(block_size: int, source: str) -> None:
    launch = prefilled(torch.bfloat16, 3, 200, 2, 2, 64, block_size)
    assert launch.kernel.source == f"paged_prefill_attention_{source}"


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("block_size", [8, 16, 128, 256])
def test_boxes_are_where_the_caches_rows_are(dim: int, block_size: int) -> None:
    """A box is 64 elements, 8 tokens, the halves of a head, one head, groups of 8 tokens: a tile's, of one block."""
    caches = [torch.empty(3, block_size, 2, dim, dtype=torch.bfloat16) for _ in "kv"]
    query, ends = torch.empty(5, 2, dim, dtype=torch.bfloat16), torch.empty(2, dtype=torch.int32)
    arguments = query, *caches, ends[:, None], ends, ends[:1], 5, SCALE, 0, 0.0, query
    launch = recorded_launch(prefill._cuda, *arguments)
    for name, cache in zip(("k_map", "v_map"), caches, strict=True):
        found: TensorMap = launch[name]
        assert (found.address, found.dtype) == (cache.data_ptr(), torch.bfloat16)
        assert found.box == (64, 8, dim // 64, 1, min(block_size, 128) // 8)
        assert math.prod(found.sizes) == cache.numel()
        corners = [(0, size - 1) for size in found.sizes]
        for element, token, half, head, group in itertools.product(*corners):
            of_block, in_block = divmod(8 * group + token, block_size)
            place = cache[of_block, in_block, head, 64 * half + element].data_ptr()
            strides = zip((token, half, head, group), found.strides, strict=True)
            assert found.address + 2 * element + sum(number * stride for number, stride in strides) == place


def test_launches_in_a_row_do_not_share_a_counter() -> None:
    query, caches, tables = meta(5, 2, 64), paged(torch.float16, 2, 64, 16), ints(1, 3)
    query = query.to(torch.float16)
    arguments = query, *caches, tables, ints(2), ints(1), 5, SCALE, 0, 0.0, query
    with recorded() as launches:
        for _ in range(len(COUNTERS) + 1):
            prefill._cuda(*arguments)
    assert [launch["num_drawn"] for launch in launches] == [*COUNTERS, COUNTERS[0]]


def test_nothing_is_launched_for_nothing() -> None:
    query, caches, no_table = meta(0, 2, 64), paged(torch.bfloat16, 2, 64, 16), ints(0, 3)
    some, table = meta(5, 2, 64), ints(1, 3)
    with recorded() as launches:
        decode.launch(query, *caches, no_table, ints(0), SCALE, 0, 0.0, query)
        prefill._cuda(query, *caches, no_table, ints(1), ints(0), 5, SCALE, 0, 0.0, query)
        prefill._cuda(some, *caches, table, ints(2), ints(1), 0, SCALE, 0, 0.0, some)
    assert not launches


def test_a_query_that_is_not_dense_is_made_so() -> None:
    query, out = meta(8, 3, 2, 64)[:, 0], meta(8, 2, 64)
    arguments = query, *paged(torch.bfloat16, 2, 64, 16), ints(8, 3), ints(8), SCALE, 0, 0.0, out
    launch = recorded_launch(decode.launch, *arguments)
    assert launch["query"].is_contiguous()
