"""A model family bound to a checkpoint: every hook as it takes effect, with its default and its checks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from operator import attrgetter
from typing import Final, Literal

import numpy as np

from registry.context import InputContext
from registry.contract import MAX_ITEM_TOKENS, check_dummy_data, check_layout, expect_type, is_count
from registry.defaults.dummy_data import default_dummy_data
from registry.defaults.input_mapper import default_input_mapper
from registry.defaults.input_processor import splice_replacements
from registry.defaults.max_tokens import find_largest
from registry.errors import CheckpointError, InvalidHookError, MissingHookError, UnknownModalityError
from registry.hooks import Hooks, SupportsMultiModal, hooks_of
from registry.inputs import DummyData, ProcessorInputs
from registry.layout import ItemLayout, Run, TensorSpec
from registry.media import MediaInfo, MediaItem, check_modality

Measure = Literal["num_tokens", "length", "num_bytes"]
"""What a layout is largest in: feature tokens, all tokens, or bytes of its tensors."""
MAX_SHOWN_VALUES: Final = 16


class ModelFamily:
    """One family on one checkpoint; what both services work with.

    Making it checks that every hook the family needs is there (MissingHookError names the one that is not).
    """

    def __init__(self, cls: type[SupportsMultiModal], ctx: InputContext) -> None:
        self.cls = cls
        self.ctx = ctx
        self.hooks: Hooks = hooks_of(cls)
        self._layouts: dict[MediaInfo, ItemLayout] = {}
        self._modality_of_keyword: dict[str, str] = {}
        self._check_complete()

    @property
    def name(self) -> str:
        """The family's class name."""
        return self.cls.__name__

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modalities the family supports."""
        return self.hooks.modalities

    def has_layout(self, modality: str) -> bool:
        """Whether items of `modality` can be planned from headers."""
        return modality in self.hooks.layouts

    @property
    def has_all_layouts(self) -> bool:
        """Whether the layouts name every tensor that items may have."""
        return all(self.has_layout(modality) for modality in self.modalities)

    def check_modality(self, modality: str) -> None:
        """UnknownModalityError unless the family supports `modality`."""
        check_modality(modality)
        if modality not in self.modalities:
            supported = ", ".join(self.modalities) or "none"
            raise UnknownModalityError(f"{self.name} does not support {modality} items; it supports: {supported}")

    # --- tokens -----------------------------------------------------------------------------------

    def placeholder_token_id(self, modality: str) -> int:
        """The token that stands for one item before expansion."""
        return self.cls.placeholder_token_id(self.ctx, modality)

    @cached_property
    def modality_of_placeholder(self) -> Mapping[int, str]:
        """Placeholder token id -> modality."""
        return {self.placeholder_token_id(modality): modality for modality in self.modalities}

    @cached_property
    def placeholder_texts(self) -> Mapping[str, str]:
        """Modality -> the text that becomes its placeholder token in a prompt."""
        return {modality: self._token_text(token, modality) for token, modality in self.modality_of_placeholder.items()}

    @cached_property
    def feature_token_ids(self) -> frozenset[int]:
        """Ids that only ever stand inside an item's placeholder range."""
        largest = (self.find_largest(m, "num_tokens") for m in self.modalities if self.has_layout(m))
        runs = (run for info in largest for run in self.layout(info).replacement if run.is_feature)
        return frozenset(self.modality_of_placeholder) | {run.token_id for run in runs}

    @cached_property
    def text_token_id(self) -> int:
        """A token id that is neither special nor a feature: what dummy prompts are padded with."""
        reserved = set(self.ctx.tokenizer.all_special_ids) | set(self.modality_of_placeholder)
        return next(token for token in range(self.ctx.vocab_size) if token not in reserved)

    # --- the hooks --------------------------------------------------------------------------------

    def layout(self, info: MediaInfo) -> ItemLayout:
        """The item's layout; InvalidHookError if the hook breaks its contract."""
        known = self._layouts.get(info)
        if known is None:
            known = self._checked_layout(info)
            if len(self._layouts) >= 4096:
                self._layouts.clear()
            self._layouts[info] = known
        return known

    def map_item(self, item: MediaItem) -> dict[str, np.ndarray]:
        """The item's tensors, contiguous, exactly as the layout says; constants are checked and dropped."""
        where = f"{self.name}: the {item.modality} input mapper"
        emitted: Mapping[str, np.ndarray] = expect_type(self.emit(item), Mapping, where)  # type: ignore[type-abstract]
        arrays = dict(emitted)
        if not self.has_layout(item.modality):
            self._check_keywords(arrays, item.modality)
            return {name: np.asarray(array, order="C") for name, array in arrays.items()}
        layout = self.layout(item.info)
        self._drop_constants(arrays, layout, item.info)
        return {name: self._match_spec(arrays, name, layout, item.info) for name in layout.tensors}

    def max_tokens(self, modality: str) -> int:
        """Upper bound of feature tokens per item; InvalidHookError if it is no number of tokens."""
        self.check_modality(modality)
        hook = self.hooks.max_tokens.get(modality)
        if hook is None:
            number = self.layout(self.find_largest(modality, "num_tokens")).num_tokens
        else:
            number = hook(self.ctx) if callable(hook) else hook
        if not is_count(number, 1) or number > MAX_ITEM_TOKENS:
            raise InvalidHookError(
                f"{self.name}: the maximum {modality} tokens is {number!r}; "
                f"it must be an int from 1 to {MAX_ITEM_TOKENS}"
            )
        return number

    def process(self, inputs: ProcessorInputs) -> ProcessorInputs:
        """Expand the prompt; see ProcessorInputs."""
        for info in inputs.media:
            self.check_modality(info.modality)
        if self.hooks.input_processor is None:
            return splice_replacements(self, inputs)
        result = self.hooks.input_processor(self.ctx, inputs)
        processed = expect_type(result, ProcessorInputs, f"{self.name}: the input processor")
        self._check_ranges(processed, len(inputs.media))
        return processed

    def dummy_data(self, seq_len: int, mm_counts: Mapping[str, int]) -> tuple[ProcessorInputs, list[MediaItem]]:
        """The registered dummy data, expanded and checked: at least `seq_len` tokens and `mm_counts` items."""
        hook = self.hooks.dummy_data
        where = f"{self.name}: the dummy data"
        data = (
            check_dummy_data(hook(self.ctx, seq_len, mm_counts), where)
            if hook
            else default_dummy_data(self, seq_len, mm_counts)
        )
        for modality, count in mm_counts.items():
            self._check_dummy_count(data, modality, count)
        inputs = self.process(ProcessorInputs(list(data.prompt_token_ids), [item.info for item in data.items]))
        if (length := len(inputs.prompt_token_ids)) < seq_len:
            raise InvalidHookError(f"{self.name}: dummy data has {length} tokens; at least {seq_len} were asked for")
        return inputs, list(data.items)

    def find_largest(self, modality: str, measure: Measure) -> MediaInfo:
        """The media facts within the limits whose layout has most of `measure`; tokens, then bytes break ties."""
        key = (modality, measure)
        if key not in self._largest:
            self._largest[key] = find_largest(
                self.ctx, modality, self.layout, attrgetter(measure, "num_tokens", "num_bytes")
            )
        return self._largest[key]

    def observed_layout(self, modality: str, token_ids: Sequence[int], tensors: Mapping[str, TensorSpec]) -> ItemLayout:
        """For a modality without a layout: what an item's range and tensors show.

        The features go where the modality's placeholder token stands in the range.
        """
        placeholder = self.placeholder_token_id(modality)
        runs = [Run(token, len(list(same)), token == placeholder) for token, same in groupby(token_ids)]
        return ItemLayout(runs, tensors)

    def emit(self, item: MediaItem) -> Mapping[str, np.ndarray]:
        """Whatever the item's mapper returns, unchecked."""
        if (hook := self.hooks.input_mappers.get(item.modality)) is not None:
            return hook(self.ctx, item)
        return default_input_mapper(self.ctx, item, self.hooks.input_mappers.get("image"))

    # --- checks -----------------------------------------------------------------------------------

    @cached_property
    def _largest(self) -> dict[tuple[str, str], MediaInfo]:
        return {}

    def _token_text(self, token_id: int, modality: str) -> str:
        text = self.ctx.tokenizer.convert_ids_to_tokens(token_id)
        if text is None:
            raise CheckpointError(
                f"{self.name}: the {modality} placeholder is token {token_id}, which the tokenizer of "
                f"{self.ctx.model_dir} does not have"
            )
        return str(text)

    def _check_complete(self) -> None:
        if not self.modalities:
            raise MissingHookError(f"{self.name} registers nothing; a family needs a layout or an input mapper")
        for modality in self.modalities:
            if not self.has_layout(modality):
                self._check_complete_without_layout(modality)

    def _check_complete_without_layout(self, modality: str) -> None:
        present = {
            "an input mapper": modality in self.hooks.input_mappers,
            "the maximum tokens": self.hooks.max_tokens.get(modality) is not None,
            "dummy data": self.hooks.dummy_data is not None,
            "an input processor": self.hooks.input_processor is not None,
        }
        for what, is_there in present.items():
            if not is_there:
                there = ", ".join(name for name, value in present.items() if value) or "nothing"
                raise MissingHookError(
                    f"{self.name} has no layout for {modality}, so it must register {what} by hand; registered: {there}"
                )

    def _checked_layout(self, info: MediaInfo) -> ItemLayout:
        self.check_modality(info.modality)
        hook = self.hooks.layouts.get(info.modality)
        if hook is None:
            raise MissingHookError(f"{self.name} has no layout for {info.modality}")
        layout = check_layout(hook(self.ctx, info), f"{self.name}: the layout of {info}", self.ctx.vocab_size)
        self._check_keywords((*layout.tensors, *layout.constants), info.modality)
        return layout

    def _check_keywords(self, names: Iterable[str], modality: str) -> None:
        """The model could not tell two modalities' tensors apart if they had the same name."""
        for name in names:
            if (owner := self._modality_of_keyword.setdefault(name, modality)) != modality:
                raise InvalidHookError(
                    f"{self.name}: both {owner} and {modality} items emit {name}; a keyword belongs to one modality"
                )

    def _drop_constants(self, arrays: dict[str, np.ndarray], layout: ItemLayout, info: MediaInfo) -> None:
        for name in layout.constants.keys() & arrays.keys():
            emitted = _without_batch_axis(arrays.pop(name), layout.constants[name].shape)
            if not np.array_equal(emitted, layout.constants[name]):
                raise InvalidHookError(
                    f"{self.name}: the input mapper's {name} differs from the layout's for {info}: "
                    f"{_shown(emitted)} instead of {_shown(layout.constants[name])}"
                )
        if extra := arrays.keys() - layout.tensors.keys():
            raise InvalidHookError(
                f"{self.name}: the input mapper emits {', '.join(sorted(extra))}, which the layout does not name; "
                f"it names {', '.join(layout.tensors)}"
            )

    def _match_spec(
        self, arrays: Mapping[str, np.ndarray], name: str, layout: ItemLayout, info: MediaInfo
    ) -> np.ndarray:
        if name not in arrays:
            raise InvalidHookError(f"{self.name}: the input mapper does not emit {name}, which the layout names")
        spec = layout.tensors[name]
        array = _without_batch_axis(np.asarray(arrays[name]), spec.shape)
        if array.shape != spec.shape or array.dtype.name != spec.dtype:
            raise InvalidHookError(
                f"{self.name}: the input mapper's {name} is {array.dtype.name} {list(array.shape)} for {info}; "
                f"the layout says {spec.dtype} {list(spec.shape)}"
            )
        return np.asarray(array, order="C")

    def _check_ranges(self, processed: ProcessorInputs, num_items: int) -> None:
        """Every item has its range, in order, inside the prompt."""
        if len(processed.placeholders) != num_items:
            raise InvalidHookError(
                f"{self.name}: the input processor gives {len(processed.placeholders)} placeholder ranges for "
                f"{num_items} items"
            )
        end = 0
        for index, place in enumerate(processed.placeholders):
            if place.offset < end or place.length < 1 or place.end > len(processed.prompt_token_ids):
                raise InvalidHookError(
                    f"{self.name}: the input processor puts item {index} at tokens {place.offset} to {place.end}; "
                    f"it must lie between {end} and {len(processed.prompt_token_ids)}"
                )
            end = place.end

    def _check_dummy_count(self, data: DummyData, modality: str, count: int) -> None:
        items = sum(item.modality == modality for item in data.items)
        if items < count:
            raise InvalidHookError(f"{self.name}: dummy data has {items} {modality} items; {count} were asked for")
        placeholder = self.placeholder_token_id(modality)
        placeholders = data.prompt_token_ids.count(placeholder)
        if placeholders < count:
            raise InvalidHookError(
                f"{self.name}: dummy data has {placeholders} {modality} placeholders; {count} were asked for"
            )


def _shown(array: np.ndarray) -> str:
    """A small array's values; of a large one what can be read: its shape and its sum."""
    if array.size <= MAX_SHOWN_VALUES:
        return str(array.tolist())
    return f"{list(array.shape)} values with sum {array.sum()}"


def _without_batch_axis(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Drop a leading axis of 1 that `shape` does not have."""
    if array.ndim == len(shape) + 1 and array.shape[0] == 1:
        return array[0]
    return array
