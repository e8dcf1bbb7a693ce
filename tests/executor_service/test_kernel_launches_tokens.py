"""Launches of kernels that take a step's tokens or rows of logits, held to what the kernels' sources say."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from executor_service.kernels import embed_merge, rotary_write_kv, sample, write_kv
from executor_service.kernels.cuda.code import SOURCES
from tests.executor_service.compiled_kernels import constants
from tests.executor_service.host_kernels import needs_compiler
from tests.executor_service.launch_recorder import (
    ACCESSES,
    GPUS,
    H100,
    L40,
    Gpu,
    Launch,
    covers,
    meta,
    recorded,
    recorded_launch,
)

pytestmark = needs_compiler
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = st.sampled_from(DTYPES)


def widest_access(*multiples: int) -> int:
    """Bytes of the widest that there is a kernel for, and that divides all of these."""
    return next(size for size in (16, 4, 2) if not any(value % size for value in multiples))


def check_row(launch: Launch, row_bytes: int, access: int) -> None:
    """A row is so many accesses of the kernel, and no warp is without any."""
    assert ACCESSES[launch.kernel.template[0]] == access
    assert launch["length"] * access == row_bytes
    assert launch.block - 32 < launch["length"]
    assert launch.block in {launch["length"], *range(32, 1025, 32)}


def item_addresses(launch: Launch) -> list[int]:
    pointers = ctypes.c_void_p * constants("embed_merge")["kMaxItems"]
    return [address or 0 for address in pointers.from_address(launch["features"].getPtr())]


@given(dtypes, st.integers(1, 1 << 20), st.integers(1, 9000), st.integers(0, 3), st.integers(0, 9))
def test_embed_merge(dtype: torch.dtype, tokens: int, width: int, num_items: int, offset: int) -> None:
    table = meta(1000, width, dtype=dtype)
    features = [meta(5, width, dtype=dtype, offset=offset * number) for number in range(num_items)]
    token_ids, places = meta(tokens, dtype=torch.int64), meta(tokens, 2, dtype=torch.int32)
    launch = recorded_launch(embed_merge._cuda, token_ids, table, features, places)
    launch.check_arguments(
        token_ids=token_ids, places=places, table=table, features=launch["features"], first_item=0, out=launch["out"],
        length=launch["length"],
    )  # fmt: skip
    assert launch["out"].shape == (tokens, width)
    assert launch["out"].dtype == dtype
    assert launch.grid == (tokens, 1, 1)
    row_bytes = width * dtype.itemsize
    addresses = [item.data_ptr() for item in features]
    check_row(launch, row_bytes, widest_access(row_bytes, *addresses))
    assert item_addresses(launch)[:num_items] == addresses
    # All of a row are on their way at once, but of rows that are too long for a block.
    _, in_flight = launch.kernel.template
    assert launch.block * in_flight >= launch["length"] or launch.block == launch.kernel.max_threads


def test_embed_merge_of_a_table_that_is_not_aligned() -> None:
    table, places = meta(9, 64, offset=1), meta(3, 2, dtype=torch.int32)
    launch = recorded_launch(embed_merge._cuda, meta(3, dtype=torch.int64), table, [meta(2, 64)], places)
    check_row(launch, 128, 2)


@pytest.mark.parametrize(("num_items", "num_launches"), [(0, 1), (1, 1), (64, 1), (65, 2), (128, 2), (129, 3)])
def test_embed_merge_has_every_item_in_one_launch(num_items: int, num_launches: int) -> None:
    """Also without items there are tokens, which the launch with the first item has."""
    features, places = [torch.zeros(2, 8) for _ in range(num_items)], torch.zeros(3, 2, dtype=torch.int32)
    with recorded() as launches:
        embed_merge._cuda(torch.zeros(3, dtype=torch.int64), torch.zeros(9, 8), features, places)
    assert len(launches) == num_launches
    assert len({launch["out"].data_ptr() for launch in launches}) == 1
    firsts = [launch["first_item"] for launch in launches]
    assert firsts == list(range(0, max(num_items, 1), constants("embed_merge")["kMaxItems"]))
    addresses = [address for launch in launches for address in item_addresses(launch)]
    assert addresses[:num_items] == [item.data_ptr() for item in features]
    assert not any(addresses[num_items:])


def test_features_are_made_what_the_table_is() -> None:
    features = [torch.ones(4, 8, dtype=torch.float64), torch.ones(8, 4, dtype=torch.bfloat16).T]
    table, places = torch.zeros(9, 8, dtype=torch.bfloat16), torch.zeros(3, 2, dtype=torch.int32)
    launch = recorded_launch(embed_merge._cuda, torch.zeros(3, dtype=torch.int64), table, features, places)
    addresses = item_addresses(launch)[:2]
    assert not set(addresses) & {item.data_ptr() for item in features}
    assert launch["length"] * 16 == 8 * table.itemsize


@given(dtypes, dtypes, st.integers(1, 1 << 20), st.integers(1, 70), st.integers(1, 300))
def test_write_kv(dtype: torch.dtype, cached: torch.dtype, tokens: int, heads: int, head_dim: int) -> None:
    key, value = (meta(tokens, heads, head_dim, dtype=dtype) for _ in "kv")
    k_cache, v_cache = (meta(9, 16, heads, head_dim, dtype=cached) for _ in "kv")
    slots = meta(tokens, dtype=torch.int64)
    launch = recorded_launch(write_kv._cuda, key, value, k_cache, v_cache, slots)
    rows = (launch["key"], launch["value"])
    if dtype == cached:
        assert all(passed is given for passed, given in zip(rows, (key, value), strict=True))
    assert all(passed.dtype == cached and passed.shape == key.shape for passed in rows)
    assert (launch["k_cache"] is k_cache, launch["v_cache"] is v_cache) == (True, True)
    assert launch["slot_mapping"] is slots
    assert launch.grid == (tokens, 1, 1)
    row_bytes = heads * head_dim * cached.itemsize
    check_row(launch, row_bytes, widest_access(row_bytes))


def test_write_kv_tells_keys_from_values() -> None:
    """Also where both are copied first, from heads before tokens and another dtype."""
    key, value = (torch.full((2, 5, 8), number).transpose(0, 1) for number in (1.0, 2.0))
    caches = [torch.zeros(3, 4, 2, 8, dtype=torch.bfloat16) for _ in "kv"]
    launch = recorded_launch(write_kv._cuda, key, value, *caches, torch.zeros(5, dtype=torch.int64))
    assert [launch[name].unique().tolist() for name in ("key", "value")] == [[1.0], [2.0]]
    assert launch["key"].is_contiguous()
    assert launch["value"].is_contiguous()


def rotary(dtype: torch.dtype, tokens: int, heads: int, kv_heads: int, dim: int) -> tuple[Tensor, ...]:
    """Arguments of rotary_write_kv."""
    caches = [meta(7, 16, kv_heads, dim, dtype=dtype) for _ in "kv"]
    qkv, cos_sin = meta(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype), meta(99, dim, dtype=dtype)
    return qkv, meta(tokens, dtype=torch.int64), cos_sin, *caches, meta(tokens, dtype=torch.int64)


@given(
    dtypes, st.integers(1, 1 << 20), st.integers(0, 130), st.integers(1, 130), st.integers(1, 300),
    st.sampled_from(GPUS),
)  # fmt: skip
def test_rotary_write_kv(dtype: torch.dtype, tokens: int, heads: int, kv_heads: int, half: int, gpu: Gpu) -> None:
    arguments = rotary(dtype, tokens, heads, kv_heads, 2 * half)
    launch = recorded_launch(rotary_write_kv._cuda, *arguments, gpu=gpu)
    names = ("qkv", "positions", "cos_sin", "k_cache", "v_cache", "slot_mapping")
    launch.check_arguments(
        **dict(zip(names, arguments, strict=True)), query=launch["query"], num_heads=heads, num_kv_heads=kv_heads,
        head_dim=2 * half,
    )  # fmt: skip
    assert launch["query"].shape == (tokens, heads, 2 * half)
    _, access, each = launch.kernel.template
    assert access == (1 if half * dtype.itemsize % 16 else 16 // dtype.itemsize)
    assert each == (2 if tokens >= 2 * gpu.multiprocessors else 1)
    assert launch.grid[0] == tokens
    packs = half // access
    assert launch.block % packs == 0
    assert covers(launch.grid[1], each * (launch.block // packs), heads + 2 * kv_heads)
    # No smaller blocks than a token in so few of them needs.
    assert covers(launch.grid[1], each * (launch.kernel.max_threads // packs), heads + 2 * kv_heads)


@pytest.mark.parametrize("gpu", GPUS)
def test_rotary_write_kv_has_more_loads_under_way_of_many_tokens(gpu: Gpu) -> None:
    """Two tokens for each multiprocessor are many."""
    tokens = 2 * gpu.multiprocessors
    few, many = (
        recorded_launch(rotary_write_kv._cuda, *rotary(torch.bfloat16, count, 32, 8, 128), gpu=gpu)
        for count in (tokens - 1, tokens)
    )
    assert (few.kernel.template[2], many.kernel.template[2]) == (1, 2)


@pytest.mark.parametrize(("dtype", "widest"), [(torch.float32, 4096), (torch.bfloat16, 8192)])
def test_rotary_write_kv_says_what_is_too_wide(dtype: torch.dtype, widest: int) -> None:
    """A block has at least one head."""
    assert recorded_launch(rotary_write_kv._cuda, *rotary(dtype, 3, 1, 1, widest)).block == 512
    assert recorded_launch(rotary_write_kv._cuda, *rotary(dtype, 3, 1, 1, 1022)).block == 511
    for dim, halves in ((widest + 32, 1026), (1026, 1026)):
        packs = dim * dtype.itemsize // 16 if dim > widest else halves
        with pytest.raises(ValueError, match=f"at most 1024 accesses, not of {packs}"), recorded():
            rotary_write_kv._cuda(*rotary(dtype, 3, 1, 1, dim))


def test_rotary_write_kv_of_few_tokens_has_small_blocks() -> None:
    """As even as heads let them be: of 80 heads of 8 accesses, 64 in a block at most, each has 40, not 64 and 16."""
    launch = recorded_launch(rotary_write_kv._cuda, *rotary(torch.bfloat16, 1, 56, 12, 128))
    assert (launch.grid, launch.block) == ((1, 2, 1), 40 * 8)


def sampling(
    dtype: torch.dtype, rows: int, width: int, counts: int = 0, seen: int = 0
) -> tuple[Tensor, Tensor, Tensor, sample.SamplingTables]:
    """Arguments of sample, with tables for ten requests."""
    padded = -(-width // 8) * 8
    tables = sample.SamplingTables(
        meta(10, len(sample.Real), dtype=torch.float64),
        meta(10, len(sample.Integer), dtype=torch.int64),
        meta(10, 3, dtype=torch.int32),
        meta(10, 3, dtype=torch.float64),
        meta(10, 5, dtype=torch.int32),
        meta(10, seen or padded // 8, dtype=torch.uint8),
        meta(10, counts or padded, dtype=torch.int16),
    )
    return meta(rows, width, dtype=dtype), meta(rows, dtype=torch.int64), meta(rows, dtype=torch.int64), tables


@given(
    dtypes, st.integers(1, 1 << 20), st.one_of(st.integers(1, 70_000), st.integers(1, 1 << 19)), st.booleans(),
    st.sampled_from(GPUS),
)  # fmt: skip
def test_sample(dtype: torch.dtype, rows: int, width: int, has_order: bool, gpu: Gpu) -> None:
    logits, slots, numbers, tables = sampling(dtype, rows, width)
    order = meta(rows, dtype=torch.int64) if has_order else None
    with recorded(gpu) as launches:
        result = sample._cuda(logits, slots, numbers, order, *tables)
    (launch,) = launches
    launch.check_arguments(
        logits=logits, slots=slots, numbers=numbers, order=0 if order is None else order, **tables._asdict(),
        lent=launch["lent"], **dict(zip(("token_ids", "logprobs", "top_ids"), result, strict=True)), width=width,
        max_biases=3, max_bans=5, seen_bytes=-(-width // 8), counts_width=-(-width // 8) * 8,
        max_logprobs=result[2].shape[1],
    )  # fmt: skip
    assert [tensor.shape for tensor in result] == [(rows,), (rows, 1 + sample.MAX_LOGPROBS), (rows, 20)]
    assert launch.grid == (rows, 1, 1)
    assert launch.block == constants("sample")["kThreads"]
    check_place(launch, rows, width, gpu)


def check_place(launch: Launch, rows: int, width: int, gpu: Gpu) -> None:
    """Rows of floats, four at a time, are in shared memory beside what the kernel has there, or else are lent."""
    place, padded = launch.kernel.template[1], -(-width // 4) * 4
    row_bytes, own_bytes = 4 * padded, shared_of_sample()
    if place:
        assert row_bytes <= launch.shared_bytes
        assert launch.shared_bytes + own_bytes <= gpu.shared_of_block
        assert launch["lent"].numel() == 0
    else:
        assert row_bytes + own_bytes > gpu.shared_of_block - 2048
        assert launch.shared_bytes == 0
        assert launch["lent"].shape == (rows, padded)


def shared_of_sample() -> int:
    """What `Shared` and `Parameters` take: two words of each bin, listed tokens, parts, and seven pointers."""
    known = constants("sample")
    return 2 * 4 * known["kBins"] + 4 * 32 + 2 * 8 * known["kMaxListed"] + 8 * known["kWarps"] + 2 * 8 + 2 * 4 + 7 * 8


@pytest.mark.parametrize("gpu", [H100, L40])
def test_the_row_that_just_fits_stays_in_shared_memory(gpu: Gpu) -> None:
    room = (gpu.shared_of_block - sample._STATIC_SHARED_BYTES) // 4
    for width in range(room - 9, room + 9):
        logits, slots, numbers, tables = sampling(torch.bfloat16, 2, width)
        launch = recorded_launch(sample._cuda, logits, slots, numbers, None, *tables, gpu=gpu)
        check_place(launch, 2, width, gpu)
        assert launch.kernel.template[1] == (width <= room // 4 * 4)


def test_sample_says_what_it_does_not_take() -> None:
    for width, counts, seen in ((1000, 999, 125), (1001, 1001, 126), (1000, 996, 125), (1000, 1000, 124)):
        logits, slots, numbers, tables = sampling(torch.bfloat16, 2, width, counts, seen)
        with pytest.raises(ValueError, match=f"counts of {counts} tokens, {8 * seen} in the"), recorded() as launches:
            sample._cuda(logits, slots, numbers, None, *tables)
        assert not launches
    logits, slots, numbers, tables = sampling(torch.bfloat16, 2, (1 << 19) + 1)
    with pytest.raises(ValueError, match="takes at most 524288"), recorded():
        sample._cuda(logits, slots, numbers, None, *tables)
    assert recorded_launch(sample._cuda, *_flat(sampling(torch.bfloat16, 2, 1000, 1000, 125)))
    assert recorded_launch(sample._cuda, *_flat(sampling(torch.bfloat16, 2, 1 << 19)))


def _flat(arguments: tuple[Tensor, Tensor, Tensor, sample.SamplingTables]) -> tuple[Tensor | None, ...]:
    logits, slots, numbers, tables = arguments
    return logits, slots, numbers, None, *tables


@pytest.mark.parametrize(("name", "columns"), [("Real", sample.Real), ("Integer", sample.Integer)])
def test_the_kernel_has_the_columns_of_the_tables(name: str, columns: type[sample.Real | sample.Integer]) -> None:
    (declared,) = re.findall(rf"enum {name} {{(.*?)}}", (SOURCES / "sample.cu").read_text(), re.DOTALL)
    expected = [f"k{''.join(word.capitalize() for word in column.name.split('_'))}" for column in columns]
    assert [word.strip() for word in declared.split(",")] == [*expected, f"kNum{name}s"]
    assert [int(column) for column in columns] == list(range(len(columns)))
    assert constants("sample")["kMaxBestOfThreads"] == sample._MAX_LISTED_TOP_K


def test_blocks_are_as_large_as_was_fastest() -> None:
    """As measured (docs/notes/streaming.md); nothing else depends on it."""
    rows, caches = meta(99, 32, 128), (meta(3, 16, 32, 128) for _ in "kv")
    with recorded() as launches:
        embed_merge._cuda(meta(99, dtype=torch.int64), meta(9, 4096), [], meta(99, 2, dtype=torch.int32))
        write_kv._cuda(rows, rows, *caches, meta(99, dtype=torch.int64))
        rotary_write_kv._cuda(*rotary(torch.bfloat16, 999, 64, 32, 128))
    assert [launch.block for launch in launches] == [256, 256, 512]


def test_nothing_is_launched_for_nothing() -> None:
    no_ids, no_rows = meta(0, dtype=torch.int64), meta(0, 2, 8)
    with recorded() as launches:
        embed_merge._cuda(no_ids, meta(9, 8), [], meta(0, 2, dtype=torch.int32))
        write_kv._cuda(no_rows, no_rows, meta(3, 4, 2, 8), meta(3, 4, 2, 8), no_ids)
        rotary_write_kv._cuda(*rotary(torch.bfloat16, 0, 2, 1, 8))
        sample._cuda(*_flat(sampling(torch.bfloat16, 0, 100)))
    assert not launches


def test_what_is_not_dense_is_made_so() -> None:
    qkv, *others = rotary(torch.bfloat16, 8, 2, 1, 8)
    logits, *rest = _flat(sampling(torch.bfloat16, 8, 100))
    with recorded() as launches:
        rotary_write_kv._cuda(qkv.T.contiguous().T, *others)
        sample._cuda(logits.T.contiguous().T, *rest)
    assert launches[0]["qkv"].is_contiguous()
    assert launches[1]["logits"].is_contiguous()
