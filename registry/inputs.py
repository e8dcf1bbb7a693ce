"""`INPUT_REGISTRY`: dummy data and input processors, by class; and the types those hooks exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from registry.hooks import Decorator, DummyDataHook, FamilyT, InputProcessorHook, note_registration
from registry.layout import ItemLayout, PlaceholderRange
from registry.media import MediaInfo, MediaItem


@dataclass(frozen=True)
class ProcessorInputs:
    """A prompt on its way through an input processor.

    Before: ids with one placeholder token per item, and the items' facts in prompt order. After: the
    expanded ids, and where each item's replacement stands.
    """

    prompt_token_ids: list[int]
    media: Sequence[MediaInfo]
    placeholders: Sequence[PlaceholderRange] = ()
    layouts: Sequence[ItemLayout] = ()


class DummyData(NamedTuple):
    """A prompt with the maximum possible number of multimodal tokens, for profiling memory at boot.

    `prompt_token_ids` are not expanded yet: one placeholder token per item, in order, and text. A plain
    tuple does as well.
    """

    prompt_token_ids: list[int]
    items: list[MediaItem]


class InputRegistry:
    """Decorators for what concerns the whole prompt."""

    def register_dummy_data(self, dummy_data: DummyDataHook | None = None) -> Decorator:
        """Register `(ctx, seq_len, mm_counts) -> DummyData`; empty: the sizes with the most features."""

        def decorate(family: FamilyT, /) -> FamilyT:
            note_registration(family, "dummy data").dummy_data = dummy_data
            return family

        return decorate

    def register_input_processor(self, processor: InputProcessorHook | None = None) -> Decorator:
        """Register `(ctx, ProcessorInputs) -> ProcessorInputs`; empty: splice each item's replacement."""

        def decorate(family: FamilyT, /) -> FamilyT:
            note_registration(family, "the input processor").input_processor = processor
            return family

        return decorate


INPUT_REGISTRY = InputRegistry()
