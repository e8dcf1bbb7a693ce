"""Media items through the model's encoder: their tensors to the device, normalised; their features back."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from executor_service.engine.request import EncodedItem, EngineItem
from executor_service.engine.scheduler import ScheduledRequest
from executor_service.layers.patches import Levels
from registry import Normalization

MAX_CAPTURED_ITEMS: Final = 2
"""What a run leaves behind, it keeps: 30 MB for a tile of CLIP."""
Failures = list[tuple[ScheduledRequest, Exception]]
"""Requests whose items could not be encoded, and why."""


class ItemMismatchError(ValueError):
    """What the sender claimed of an item without a layout is not what the encoder makes of it."""


class ItemEncoder:
    """Encodes the items of a step. Work on a GPU is enqueued, not waited for.

    Tensors go up on a stream of their own, beside what the device computes; the shared memory that they lie in must be
    page-locked for that, and stay as it is until the step's results are known.

    What a run over many items takes follows their tensors, not their features, which a step's budget counts: a narrow
    picture has as many tiles as a square one and few features. So items go through in runs of at most as many elements
    of tensors as the largest run of their modality that was profiled: `max_run_elements`, empty before that.
    """

    def __init__(self, model: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.model = model
        self._device = device
        self._dtype = dtype
        self.max_run_elements: dict[str, int] = {}
        self._tables: dict[Normalization, Tensor] = {}
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def feature_width(self) -> int:
        """Elements of one encoder feature, which are those of a row of the token embedding."""
        return int(self.model.get_input_embeddings().weight.shape[-1])

    def encode(self, items: Sequence[EngineItem]) -> None:
        """Give every item its features; items of one modality with the same tensors go through together."""
        for kind in dict.fromkeys(_kind(item) for item in items):
            for run in self._runs([item for item in items if _kind(item) == kind]):
                self._encode_run(run)

    def _runs(self, group: list[EngineItem]) -> Iterator[list[EngineItem]]:
        """The items of one kind in their order; one alone may have more elements than a run."""
        most = self.max_run_elements.get(group[0].modality)
        run, num_elements = list[EngineItem](), 0
        for item in group:
            of_item = num_tensor_elements(item)
            if run and most is not None and num_elements + of_item > most:
                yield run
                run, num_elements = [], 0
            run.append(item)
            num_elements += of_item
        yield run

    def _encode_run(self, run: list[EngineItem]) -> None:
        keywords: dict[str, Any] = {name: [self._tensor(item, name) for item in run] for name in run[0].tensors}
        for name in run[0].layout.constants:
            # On the host, whose numbers they are: a model that asked the device for them would wait for it.
            keywords[name] = [torch.from_numpy(item.layout.constants[name]) for item in run]
        for item, features in zip(run, self.model.embed_multimodal(**keywords), strict=True):
            _check_features(features, item, self.feature_width)
            # A copy, where the encoder's output is one tensor for several items: each is freed by itself.
            item.features = features.clone() if len(run) > 1 else features

    def capture(self, item: EngineItem) -> None:
        """Let the model capture its encoder's runs over one such item and a few, where it can."""
        graphs = getattr(self.model, "tower_graphs", None)
        if graphs is None or self._device.type != "cuda":
            return
        with graphs.capturing():
            for count in range(1, MAX_CAPTURED_ITEMS + 1):
                self.encode([dataclasses.replace(item, encoded=EncodedItem()) for _ in range(count)])

    def encode_batch(self, batch: list[ScheduledRequest]) -> tuple[list[ScheduledRequest], Failures]:
        """Encode all items at once; if that fails, one at a time, so that only the culprit's requests fail."""
        items = [item for scheduled in batch for item in scheduled.items]
        if not items:
            return batch, []
        began = time.monotonic()
        try:
            if self._encodes(items):
                return batch, []
            if self._device.type == "cuda":
                torch.cuda.synchronize()  # raises again if the device itself is lost: then nobody can be served
            return self._encode_one_by_one(batch)
        finally:
            _note_encoding(batch, began)

    def _encodes(self, items: Sequence[EngineItem]) -> bool:
        """Whether it worked; nothing of an attempt that failed is kept: tensors without a layout may raise anything."""
        try:
            self.encode(items)
        except Exception:
            return False
        return True

    def _encode_one_by_one(self, batch: list[ScheduledRequest]) -> tuple[list[ScheduledRequest], Failures]:
        """Whoever needs an item that cannot be encoded fails, be it the one that was to encode it or not."""
        errors: dict[int, Exception] = {}
        for item in (item for scheduled in batch for item in scheduled.items):
            try:
                self.encode([item])
            except Exception as error:
                # Without its traceback, whose frames keep what the encoder had made.
                errors[id(item.encoded)] = _blame(error, item).with_traceback(None)
        good, failed = list[ScheduledRequest](), Failures()
        for scheduled in batch:
            culprit = next((id(i.encoded) for i in scheduled.request.items if id(i.encoded) in errors), None)
            if culprit is None:
                good.append(scheduled)
            else:
                failed.append((scheduled, errors[culprit]))
        return good, failed

    def _tensor(self, item: EngineItem, name: str) -> Tensor | Levels:
        """An item's tensor on the device in the model's dtype, normalised if its layout says so.

        A model may take what is to be normalised as it comes.
        """
        tensor = self._upload(item.tensors[name])
        normalization = item.layout.tensors[name].normalization
        if normalization is not None:
            levels = Levels(tensor, self._table(normalization), normalization.channel_axis)
            is_taken = getattr(self.model.embed_multimodal, "takes_levels", False)
            return levels if is_taken else levels.normalized(self._dtype)
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def _upload(self, tensor: Tensor) -> Tensor:
        if self._copies is None:
            return tensor
        here = torch.cuda.current_stream()
        with torch.cuda.stream(self._copies):
            copied = tensor.to(self._device, non_blocking=True)
        here.wait_stream(self._copies)
        copied.record_stream(here)
        return copied

    def _table(self, normalization: Normalization) -> Tensor:
        if normalization not in self._tables:
            self._tables[normalization] = torch.from_numpy(normalization.table).to(self._device)
        return self._tables[normalization]


def num_tensor_elements(item: EngineItem) -> int:
    """Of all tensors of an item; their dtype may be the sender's choice."""
    return sum(tensor.numel() for tensor in item.tensors.values())


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
