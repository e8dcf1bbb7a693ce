"""A step's arrays: flattened, padded for a graph, and where the device finds them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from executor_service.engine.block_manager import BlockManager
from executor_service.engine.decode_graphs import graph_sizes, size_holding
from executor_service.engine.limits import EngineLimits
from executor_service.engine.messages import SamplingParams
from executor_service.engine.request import Request
from executor_service.engine.scheduler import ScheduledRequest
from executor_service.engine.step_inputs import NO_SLOT, NOT_SAMPLED, InputStage, lay_out, pad_decodes

BLOCK_SIZE = 4
LIMITS = EngineLimits(
    max_num_batched_tokens=32, max_num_seqs=6, max_num_encoder_tokens=8, max_model_len=40, block_size=BLOCK_SIZE
)


def scheduled(number: int, computed: int, num_tokens: int, blocks: BlockManager, inflight: int = 0) -> ScheduledRequest:
    """A request of so many computed tokens; token n of request r is 100 * r + n."""
    known = computed + num_tokens - inflight
    request = Request(number, [100 * number + n for n in range(known)], [], SamplingParams(max_tokens=8), 40)
    request.num_inflight_tokens, request.sampled_row = inflight, 10 + number
    request.num_computed_tokens = computed
    assert blocks.reserve(request, computed + num_tokens)
    return ScheduledRequest(request, num_tokens)


@pytest.fixture
def batch() -> list[ScheduledRequest]:
    """Two decodes, one of them with its token still on the device, and a chunk."""
    blocks = BlockManager(20, BLOCK_SIZE)
    return [scheduled(1, 9, 1, blocks), scheduled(2, 4, 1, blocks, inflight=1), scheduled(3, 2, 5, blocks)]


def test_flattened(batch: list[ScheduledRequest]) -> None:
    host = lay_out(batch, BLOCK_SIZE)
    tables = [one.request.block_table for one in batch]
    assert host.token_ids.tolist() == [109, 0, 302, 303, 304, 305, 306]
    assert host.sampled_rows.tolist() == [NOT_SAMPLED, 12, *[NOT_SAMPLED] * 5]
    assert host.positions.tolist() == [9, 4, 2, 3, 4, 5, 6]
    places = [(0, 9), (1, 4), *((2, n) for n in range(2, 7))]
    assert host.slot_mapping.tolist() == [tables[r][n // BLOCK_SIZE] * BLOCK_SIZE + n % BLOCK_SIZE for r, n in places]
    assert host.cu_seqlens.tolist() == [0, 1, 2, 7]
    assert host.seq_lens.tolist() == [10, 5, 7]
    assert (host.num_decodes, host.max_query_len) == (2, 5)
    for row, table in zip(host.block_tables, tables, strict=True):
        assert row.tolist() == [*table, *[0] * (3 - len(table))]
    assert (host.slot_mapping.dtype, host.block_tables.dtype) == (np.int64, np.int32)


def test_tokens_of_the_step_before_are_found_on_the_device(batch: list[ScheduledRequest]) -> None:
    inputs, _ = InputStage(torch.device("cpu"), LIMITS).upload(lay_out(batch, BLOCK_SIZE))
    sampled = torch.arange(1000, 1020)
    assert inputs.known_token_ids(sampled).tolist() == [109, 1012, 302, 303, 304, 305, 306]


def test_padding_writes_and_reads_nothing(batch: list[ScheduledRequest]) -> None:
    host = lay_out(batch[:2], BLOCK_SIZE)
    padded = pad_decodes(host, 4, 10)
    assert padded.slot_mapping.tolist() == [*host.slot_mapping, NO_SLOT, NO_SLOT]
    assert padded.seq_lens.tolist() == [10, 5, 0, 0]
    assert padded.cu_seqlens.tolist() == [0, 1, 2, 3, 4]
    assert padded.block_tables.shape == (4, 10)
    assert (padded.block_tables[:2, :3] == host.block_tables).all()
    empty = pad_decodes(None, 4, 10)
    assert {name: value.shape for name, value in vars(empty).items() if isinstance(value, np.ndarray)} == {
        name: value.shape for name, value in vars(padded).items() if isinstance(value, np.ndarray)
    }


class StageInHostMemory(InputStage):
    """The device's buffer in memory that a test can look at."""

    def __init__(self, limits: EngineLimits) -> None:
        super().__init__(torch.device("cpu"), limits)
        self._on_gpu = True
        self._make_buffers(torch.device("cpu"), limits, pin_memory=False)


class NoEvent:
    def record(self) -> None: ...

    def synchronize(self) -> None: ...


def test_one_copy_has_everything_at_addresses_of_the_sizes_alone(batch, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", NoEvent)
    stage = StageInHostMemory(LIMITS)
    first, _ = stage.upload(pad_decodes(None, 4, 10))
    host = pad_decodes(lay_out(batch[:2], BLOCK_SIZE), 4, 10)
    second, _ = stage.upload(host)
    for name in ("slot_mapping", "cu_seqlens", "seq_lens", "block_tables"):
        there = getattr(second.metadata, name)
        assert np.array_equal(there.numpy(), getattr(host, name))
        assert there.data_ptr() == getattr(first.metadata, name).data_ptr()
        assert there.data_ptr() % 16 == stage._buffer.data_ptr() % 16
    assert np.array_equal(second.token_ids.numpy(), host.token_ids)
    assert second.token_ids.data_ptr() == first.token_ids.data_ptr()


def test_the_largest_step_fits_and_more_arrays_come_back_in_order(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", NoEvent)
    blocks = BlockManager(200, BLOCK_SIZE)
    batch = [scheduled(n, 35 - (n == 0), 1, blocks) for n in range(5)] + [scheduled(5, 0, 27, blocks)]
    rows, places = np.arange(6), np.arange(64, dtype=np.int32).reshape(32, 2)
    inputs, (there_rows, there_places) = StageInHostMemory(LIMITS).upload(lay_out(batch, BLOCK_SIZE), rows, places)
    assert np.array_equal(there_rows.numpy(), rows)
    assert np.array_equal(there_places.numpy(), places)
    assert inputs.metadata.seq_lens.tolist() == [35, 36, 36, 36, 36, 27]


@pytest.mark.parametrize(
    ("largest", "sizes"),
    [
        (1, [1]),
        (2, [2, 1]),
        (3, [3, 2, 1]),
        (8, [8, 4, 2, 1]),
        (9, [9, 8, 4, 2, 1]),
        (64, [64, 48, 32, 16, 8, 4, 2, 1]),
        (129, [129, 128, 112, 96, 80, 64, 48, 32, 16, 8, 4, 2, 1]),
        (200, [200, 192, 160, 128, 112, 96, 80, 64, 48, 32, 16, 8, 4, 2, 1]),
        (256, [256, 224, 192, 160, 128, 112, 96, 80, 64, 48, 32, 16, 8, 4, 2, 1]),
        (700, [700, 640, *range(512, 128, -32), *range(128, 0, -16), 8, 4, 2, 1]),
        (5000, [5000, *range(4096, 512, -128), *range(512, 128, -32), *range(128, 0, -16), 8, 4, 2, 1]),
    ],
)
def test_which_batch_sizes_have_a_graph(largest: int, sizes: list[int]) -> None:
    """The largest first, whose memory all others share; sizes lie wider apart the more a step reads anyway."""
    assert graph_sizes(largest) == sizes


def test_a_step_takes_the_smallest_graph_that_holds_it() -> None:
    sizes = sorted(graph_sizes(64))
    for count in range(1, 65):
        size = size_holding(count, sizes)
        assert size in sizes
        assert size >= count
        assert not any(count <= smaller < size for smaller in sizes)
    assert size_holding(65, sizes) is None
