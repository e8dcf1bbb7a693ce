"""A step's batch as arrays on the host, and as tensors on the device in one copy.

Arrays are laid out behind each other in one page-locked buffer, and the device has them at addresses that depend on
their sizes alone: a CUDA graph that was captured for these sizes finds the next step's numbers where it expects them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from executor_service.engine.limits import EngineLimits
from executor_service.engine.scheduler import ScheduledRequest
from executor_service.layers.context import AttentionMetadata

_MAX_AXES: Final = 4
"""Of positions."""
_NUM_BUFFERS: Final = 2
"""One that the device may still read, one that the host writes."""
_MAX_ARRAYS: Final = 16
_ALIGNMENT: Final = 16
"""Bytes; the kernels' widest access."""
NO_SLOT: Final = -1
NOT_SAMPLED: Final = -1


@dataclass(frozen=True)
class HostBatch:
    """R requests, T tokens; what `AttentionMetadata` says of the same names.

    `token_ids` [T] with 0 for features and for tokens that are still on the device; those are row `sampled_rows` [T] of
    what the step before has sampled, NOT_SAMPLED elsewhere. `positions` [T] or [axes, T]. All int64, but for
    `cu_seqlens`, `seq_lens`, `block_tables` and `visible_ends`, which are int32.
    """

    token_ids: np.ndarray
    sampled_rows: np.ndarray
    positions: np.ndarray
    slot_mapping: np.ndarray
    cu_seqlens: np.ndarray
    seq_lens: np.ndarray
    block_tables: np.ndarray
    num_decodes: int
    max_query_len: int
    visible_ends: np.ndarray | None = None


@dataclass(frozen=True)
class StepInputs:
    """A HostBatch on the device."""

    token_ids: Tensor
    sampled_rows: Tensor
    positions: Tensor
    metadata: AttentionMetadata

    def known_token_ids(self, sampled: Tensor) -> Tensor:
        """Token ids [T], those among them that the step before has left on the device in `sampled`."""
        there = sampled[self.sampled_rows.clamp(min=0)]
        return torch.where(self.sampled_rows < 0, self.token_ids, there)


def lay_out(batch: Sequence[ScheduledRequest], block_size: int) -> HostBatch:
    """The flattened batch; single tokens first, as the scheduler has them."""
    lengths = np.array([scheduled.num_tokens for scheduled in batch])
    starts = np.array([scheduled.request.num_computed_tokens for scheduled in batch])
    cu_seqlens = np.concatenate(([0], np.cumsum(lengths)))
    places = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1] - starts, lengths)
    tables, longest = _block_tables(batch), int(lengths.max())
    rows = np.repeat(np.arange(len(batch)), lengths)
    blocks = tables[rows, places // block_size].astype(np.int64)
    token_ids, sampled_rows = _tokens(batch, cu_seqlens)
    return HostBatch(
        token_ids,
        sampled_rows,
        _positions(batch, places),
        blocks * block_size + places % block_size,
        cu_seqlens.astype(np.int32),
        (starts + lengths).astype(np.int32),
        tables,
        num_decodes=int((lengths == 1).sum()),
        max_query_len=longest,
        visible_ends=_visible_ends(batch, cu_seqlens, places) if longest > 1 else None,
    )


def pad_decodes(batch: HostBatch | None, size: int, width: int) -> HostBatch:
    """A batch of single tokens with rows of nothing behind it, `size` in all, and tables of `width` blocks.

    A row of nothing has no slot, so it writes nothing, and no tokens, so it reads nothing. None: nothing but those.
    """
    count = 0 if batch is None else len(batch.seq_lens)

    def padded(name: str, fill: int, dtype: type[np.integer] = np.int64) -> np.ndarray:
        result = np.full(size, fill, dtype=dtype)
        if batch is not None:
            result[:count] = getattr(batch, name)
        return result

    tables = np.zeros((size, width), dtype=np.int32)
    if batch is not None:
        tables[:count, : batch.block_tables.shape[1]] = batch.block_tables
    return HostBatch(
        padded("token_ids", 0),
        padded("sampled_rows", NOT_SAMPLED),
        padded("positions", 0),
        padded("slot_mapping", NO_SLOT),
        np.arange(size + 1, dtype=np.int32),
        padded("seq_lens", 0, np.int32),
        tables,
        num_decodes=size,
        max_query_len=1,
    )


def _block_tables(batch: Sequence[ScheduledRequest]) -> np.ndarray:
    """[R, longest], int32, padded with 0."""
    widths = [len(scheduled.request.block_table) for scheduled in batch]
    tables = np.zeros((len(batch), max(widths)), dtype=np.int32)
    for row, scheduled in enumerate(batch):
        tables[row, : widths[row]] = scheduled.request.block_table
    return tables


def _positions(batch: Sequence[ScheduledRequest], places: np.ndarray) -> np.ndarray:
    """Int64 [T] or [axes, T]; `places` [T] is each token's number in its request."""
    if all(scheduled.request.counts_positions for scheduled in batch):
        return places
    starts = [scheduled.request.num_computed_tokens for scheduled in batch]
    positions = [
        scheduled.request.positions(start, start + scheduled.num_tokens)
        for scheduled, start in zip(batch, starts, strict=True)
    ]
    return np.concatenate(positions, axis=-1)


def _visible_ends(batch: Sequence[ScheduledRequest], cu_seqlens: np.ndarray, places: np.ndarray) -> np.ndarray | None:
    """How many tokens of its request each token sees: int32 [T]; None: all see just up to themselves."""
    ends: np.ndarray | None = None
    for scheduled, row in zip(batch, cu_seqlens.tolist(), strict=False):
        request, start = scheduled.request, scheduled.request.num_computed_tokens
        for first, last in request.spans_between(start, start + scheduled.num_tokens):
            if ends is None:
                ends = (places + 1).astype(np.int32)
            ends[row + max(first - start, 0) : row + last - start] = last
    return ends


def _tokens(batch: Sequence[ScheduledRequest], cu_seqlens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Token ids as far as the host knows them, and where the device has the others."""
    token_ids = np.zeros(cu_seqlens[-1], dtype=np.int64)
    sampled_rows = np.full(cu_seqlens[-1], NOT_SAMPLED, dtype=np.int64)
    for scheduled, begin in zip(batch, cu_seqlens.tolist(), strict=False):
        request, start = scheduled.request, scheduled.request.num_computed_tokens
        end = start + scheduled.num_tokens
        known = min(end, request.num_tokens)
        if start >= request.items_end and known == start + 1:
            token_ids[begin] = request.token_ids[start]  # as nearly all do nearly always
        else:
            token_ids[begin : begin + known - start] = _known_ids(scheduled, known)
        if end > known:
            sampled_rows[begin + known - start] = request.sampled_row
    return token_ids, sampled_rows


def _known_ids(scheduled: ScheduledRequest, end: int) -> np.ndarray:
    """The chunk's ids up to token `end`; feature tokens become 0, since some lie outside the embedding table."""
    request, start = scheduled.request, scheduled.request.num_computed_tokens
    chunk = request.token_ids[start:end]
    for item in request.items_between(start, end):
        begin, stop = max(item.placeholder.offset, start), min(item.placeholder.end, end)
        if begin < stop:
            mask = item.layout.feature_mask[begin - item.placeholder.offset : stop - item.placeholder.offset]
            chunk = chunk.copy()
            chunk[begin - start : stop - start][mask] = 0
    return chunk


class InputStage:
    """Brings host arrays to the device: on a GPU without waiting for it, else as they are."""

    def __init__(self, device: torch.device, limits: EngineLimits) -> None:
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            self._make_buffers(device, limits, pin_memory=True)

    def _make_buffers(self, device: torch.device, limits: EngineLimits, pin_memory: bool) -> None:
        """With room for the largest step."""
        rows = limits.max_num_seqs
        # The places of features are a long each, visible ends half of one.
        num_longs = (5 + _MAX_AXES) * limits.max_num_tokens + rows
        num_longs += (rows * (limits.max_num_blocks_per_request + 2) + 1) // 2 + _MAX_ARRAYS * _ALIGNMENT // 8
        self._buffer = torch.zeros(num_longs, dtype=torch.int64, device=device)
        self._pinned = [torch.zeros(num_longs, dtype=torch.int64, pin_memory=pin_memory) for _ in range(_NUM_BUFFERS)]
        self._copied = [torch.cuda.Event() for _ in range(_NUM_BUFFERS)]
        self._turn = 0

    def upload(self, batch: HostBatch, *more: np.ndarray) -> tuple[StepInputs, list[Tensor]]:
        """The batch, and further int64 or int32 arrays, on the device; valid until the next call."""
        longs = [batch.token_ids, batch.sampled_rows, batch.positions, batch.slot_mapping]
        ints = [batch.cu_seqlens, batch.seq_lens, batch.block_tables]
        ends = [] if batch.visible_ends is None else [batch.visible_ends]
        more_longs = [array for array in more if array.dtype == np.int64]
        more_ints = [array for array in more if array.dtype == np.int32]
        tensors = self._copy([*longs, *more_longs], [*ints, *more_ints, *ends])
        visible_ends = tensors.pop() if ends else None
        token_ids, sampled_rows, positions, slots = tensors[:4]
        cu_seqlens, seq_lens, tables = tensors[4 + len(more_longs) :][:3]
        metadata = AttentionMetadata(
            slots, cu_seqlens, seq_lens, tables, batch.num_decodes, batch.max_query_len, visible_ends
        )
        rest = [*tensors[4 : 4 + len(more_longs)], *tensors[7 + len(more_longs) :]]
        return StepInputs(token_ids, sampled_rows, positions, metadata), rest

    def _copy(self, longs: Sequence[np.ndarray], ints: Sequence[np.ndarray]) -> list[Tensor]:
        if not self._on_gpu:
            return [torch.from_numpy(np.ascontiguousarray(array)) for array in (*longs, *ints)]
        self._turn = (self._turn + 1) % _NUM_BUFFERS
        pinned, copied = self._pinned[self._turn], self._copied[self._turn]
        copied.synchronize()
        host = pinned.numpy()
        views, used = _write(host, self._buffer, longs)
        more, used_ints = _write(host[used:].view(np.int32), self._buffer[used:].view(torch.int32), ints)
        used += used_ints // 2
        self._buffer[:used].copy_(pinned[:used], non_blocking=True)
        copied.record()
        return views + more


def _write(host: np.ndarray, device: Tensor, arrays: Sequence[np.ndarray]) -> tuple[list[Tensor], int]:
    """Write arrays behind each other; the views where the device will have them, and how many elements that took."""
    views, begin, step = list[Tensor](), 0, _ALIGNMENT // host.itemsize
    for array in arrays:
        end = begin + array.size
        host[begin:end] = array.reshape(-1)
        views.append(device[begin:end].view(array.shape))
        begin = -(-end // step) * step
    return views, begin
