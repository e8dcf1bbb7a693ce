"""Runs one scheduled batch through the model: encode, embed, forward, sample."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from executor_service.engine.logprobs import PromptLogprobs, prompt_logprobs
from executor_service.engine.request import EngineItem
from executor_service.engine.sampler import SampledTokens, Sampler
from executor_service.engine.scheduler import ScheduledBatch, ScheduledRequest
from executor_service.kernels.normalize import normalize
from executor_service.layers.context import AttentionMetadata, KVCache, forward_context
from registry import Normalization


class ItemMismatchError(ValueError):
    """What the sender claimed of an item without a layout is not what the encoder makes of it."""


@dataclass(frozen=True)
class ModelOutput:
    """Sampled tokens of the requests in `requests`, parallel; `failed` could not be encoded, and why.

    `prompt_logprobs` are what the step says of prompt tokens, for the requests that ask.
    """

    requests: list[ScheduledRequest]
    sampled: SampledTokens
    failed: list[tuple[ScheduledRequest, Exception]]
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)


class ModelRunner:
    """The model on its device, the KV cache it reads and writes, and the sampler."""

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        block_size: int,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.model: Any = model
        self.device = device
        self.dtype = dtype
        self.block_size = block_size
        self.kv_caches: Sequence[KVCache] = ()
        self.sampler = Sampler(device, eos_token_ids)
        self._tables: dict[Normalization, Tensor] = {}

    @property
    def feature_width(self) -> int:
        """Elements of one encoder feature, which are those of a row of the token embedding."""
        return int(self.model.get_input_embeddings().weight.shape[-1])

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> ModelOutput:
        """One step: tokens for every request whose last token is in the batch."""
        scheduled, failed = self._encode_batch(batch.requests)
        rows = [index for index, request in enumerate(scheduled) if request.needs_token]
        if not scheduled:
            return ModelOutput([], SampledTokens([], []), failed)
        hidden, ends = self._forward(scheduled)
        scores = prompt_logprobs(scheduled, hidden, ends, self.model.compute_logits)
        if not rows:
            return ModelOutput([], SampledTokens([], []), failed, scores)
        sampling = [scheduled[row] for row in rows]
        logits = self.model.compute_logits(hidden[ends[rows] - 1])
        sampled = self.sampler.sample(logits, [row.request for row in sampling])
        return ModelOutput(sampling, sampled, failed, scores)

    def prompt_positions(
        self, prompt_token_ids: Sequence[int], items: Sequence[EngineItem]
    ) -> tuple[np.ndarray | None, int]:
        """The model's own positions of a prompt and the delta of what follows; (None, 0): counted from 0."""
        function = getattr(self.model, "positions", None)
        if function is None:
            return None, 0
        positions, delta = function(prompt_token_ids, items)
        return np.asarray(positions, dtype=np.int64), int(delta)

    # --- encoder ----------------------------------------------------------------------------------

    def encode(self, items: Sequence[EngineItem]) -> None:
        """Give every item its features; items of one modality with the same tensors go through together."""
        for kind in dict.fromkeys(_kind(item) for item in items):
            group = [item for item in items if _kind(item) == kind]
            keywords = {name: [self._tensor(item, name) for item in group] for name in group[0].tensors}
            for name in group[0].layout.constants:
                keywords[name] = [torch.from_numpy(item.layout.constants[name]).to(self.device) for item in group]
            for item, features in zip(group, self.model.embed_multimodal(**keywords), strict=True):
                _check_features(features, item, self.feature_width)
                # A copy, where the encoder's output is one tensor for several items: each is freed by itself.
                item.features = features.clone() if len(group) > 1 else features

    def _encode_batch(
        self, batch: list[ScheduledRequest]
    ) -> tuple[list[ScheduledRequest], list[tuple[ScheduledRequest, Exception]]]:
        """Encode all items at once; if that fails, one at a time, so that only the culprit's requests fail."""
        items = [item for scheduled in batch for item in scheduled.items]
        if not items:
            return batch, []
        began = time.monotonic()
        try:
            self.encode(items)
        except Exception:  # tensors without a layout may make a model raise anything
            return self._encode_one_by_one(batch)
        finally:
            _note_encoding(batch, began)
        return batch, []

    def _encode_one_by_one(
        self, batch: list[ScheduledRequest]
    ) -> tuple[list[ScheduledRequest], list[tuple[ScheduledRequest, Exception]]]:
        """Whoever needs an item that cannot be encoded fails, be it the one that was to encode it or not."""
        errors: dict[int, Exception] = {}
        for item in (item for scheduled in batch for item in scheduled.items):
            try:
                self.encode([item])
            except Exception as error:
                errors[id(item.encoded)] = _blame(error, item)
        good, failed = [], list[tuple[ScheduledRequest, Exception]]()
        for scheduled in batch:
            culprit = next((id(i.encoded) for i in scheduled.request.items if id(i.encoded) in errors), None)
            if culprit is None:
                good.append(scheduled)
            else:
                failed.append((scheduled, errors[culprit]))
        return good, failed

    def _tensor(self, item: EngineItem, name: str) -> Tensor:
        """An item's tensor on the device in the model's dtype, normalised if its layout says so."""
        tensor = item.tensors[name].to(self.device)
        normalization = item.layout.tensors[name].normalization
        if normalization is not None:
            return normalize(tensor, self._table(normalization), normalization.channel_axis, self.dtype)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _table(self, normalization: Normalization) -> Tensor:
        if normalization not in self._tables:
            self._tables[normalization] = torch.from_numpy(normalization.table).to(self.device)
        return self._tables[normalization]

    # --- language model ---------------------------------------------------------------------------

    def _forward(self, batch: list[ScheduledRequest]) -> tuple[Tensor, np.ndarray]:
        """Hidden states [T, hidden] of the flattened batch, and where each request ends in it."""
        lengths = np.array([scheduled.num_tokens for scheduled in batch])
        cu_seqlens = np.concatenate(([0], np.cumsum(lengths)))
        starts = np.array([scheduled.request.num_computed_tokens for scheduled in batch])
        places = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1] - starts, lengths)
        token_ids = np.concatenate([_token_ids(scheduled) for scheduled in batch])
        metadata = self._metadata(batch, places, cu_seqlens, starts + lengths)
        ids = self._to_device(token_ids)
        embeddings = self._embed(batch, ids, cu_seqlens)
        with forward_context(metadata, self.kv_caches):
            hidden = self.model(ids, self._to_device(_positions(batch, places)), embeddings)
        return hidden, cu_seqlens[1:]

    def _metadata(
        self, batch: list[ScheduledRequest], places: np.ndarray, cu_seqlens: np.ndarray, seq_lens: np.ndarray
    ) -> AttentionMetadata:
        widths = [len(scheduled.request.block_table) for scheduled in batch]
        tables = np.zeros((len(batch), max(widths)), dtype=np.int32)
        for row, scheduled in enumerate(batch):
            tables[row, : widths[row]] = scheduled.request.block_table
        rows = np.repeat(np.arange(len(batch)), np.diff(cu_seqlens))
        blocks = tables[rows, places // self.block_size].astype(np.int64)
        return AttentionMetadata(
            slot_mapping=self._to_device(blocks * self.block_size + places % self.block_size),
            cu_seqlens=self._to_device(cu_seqlens, np.int32),
            seq_lens=self._to_device(seq_lens, np.int32),
            block_tables=self._to_device(tables, np.int32),
            num_decodes=sum(scheduled.num_tokens == 1 for scheduled in batch),
            max_query_len=max(scheduled.num_tokens for scheduled in batch),
        )

    def _embed(self, batch: list[ScheduledRequest], token_ids: Tensor, cu_seqlens: np.ndarray) -> Tensor:
        """Token embeddings with encoder features in their places: [T, hidden]."""
        embeddings: Tensor = self.model.get_input_embeddings()(token_ids)
        for scheduled, begin in zip(batch, cu_seqlens, strict=False):
            start = scheduled.request.num_computed_tokens
            for item in scheduled.request.items_between(start, start + scheduled.num_tokens):
                _place_features(embeddings[begin : begin + scheduled.num_tokens], item, start)
        return embeddings

    def _to_device(self, array: np.ndarray, dtype: type[np.integer] = np.int64) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype)).to(self.device)


def _note_encoding(batch: Sequence[ScheduledRequest], began: float) -> None:
    """Every request that had items in the step was in the encoder from `began` until now."""
    ended = time.monotonic()
    for scheduled in batch:
        if scheduled.items:
            request = scheduled.request
            request.encode_began = request.encode_began or began
            request.encode_ended = ended


def _kind(item: EngineItem) -> tuple[str, ...]:
    """Items of one kind have the same keywords."""
    return (item.modality, *sorted(item.tensors), *sorted(item.layout.constants))


def _blame(error: Exception, item: EngineItem) -> Exception:
    """An ItemMismatchError where what failed was never attested: then it is the sender's."""
    if isinstance(error, ItemMismatchError) or item.is_attested:
        return error
    return ItemMismatchError(f"the model does not take the item's tensors: {type(error).__name__}: {error}")


def _check_features(features: Tensor, item: EngineItem, width: int) -> None:
    """ValueError unless the encoder's output fits the item's places in the prompt."""
    if not item.is_attested and len(features) != item.layout.num_tokens:
        raise ItemMismatchError(
            f"the encoder makes {len(features)} features of the {item.modality} item at token "
            f"{item.placeholder.offset}; its range has {item.layout.num_tokens} places for them"
        )
    if tuple(features.shape) != (item.layout.num_tokens, width):
        raise ValueError(
            f"the encoder made features {list(features.shape)}; the layout and the embedding ask for "
            f"{[item.layout.num_tokens, width]}"
        )


def _positions(batch: list[ScheduledRequest], places: np.ndarray) -> np.ndarray:
    """Positions of the flattened batch, int64 [T] or [axes, T]; `places` [T] is each token's number in its request."""
    if all(scheduled.request.counts_positions for scheduled in batch):
        return places
    starts = [scheduled.request.num_computed_tokens for scheduled in batch]
    positions = [
        scheduled.request.positions(start, start + scheduled.num_tokens)
        for scheduled, start in zip(batch, starts, strict=True)
    ]
    return np.concatenate(positions, axis=-1)


def _token_ids(scheduled: ScheduledRequest) -> np.ndarray:
    """The chunk's ids; feature tokens become 0, since some lie outside the embedding table."""
    request, start = scheduled.request, scheduled.request.num_computed_tokens
    end = start + scheduled.num_tokens
    chunk = request.token_ids[start:end]
    for item in request.items_between(start, end):
        begin, stop = max(item.placeholder.offset, start), min(item.placeholder.end, end)
        if begin < stop:
            mask = item.layout.feature_mask[begin - item.placeholder.offset : stop - item.placeholder.offset]
            chunk = chunk.copy()
            chunk[begin - start : stop - start][mask] = 0
    return chunk


def _place_features(rows: Tensor, item: EngineItem, start: int) -> None:
    """Overwrite the item's feature rows among `rows`, which are the request's tokens from `start` on."""
    begin, stop = max(item.placeholder.offset, start), min(item.placeholder.end, start + len(rows))
    if begin >= stop:
        return
    assert item.features is not None
    mask = item.layout.feature_mask
    first = int(mask[: begin - item.placeholder.offset].sum())
    places = np.flatnonzero(mask[begin - item.placeholder.offset : stop - item.placeholder.offset])
    features = item.features[first : first + len(places)].to(rows.dtype)
    if len(places) == stop - begin:
        rows[begin - start : stop - start] = features
    elif len(places):
        rows[torch.from_numpy(places + begin - start).to(rows.device)] = features
