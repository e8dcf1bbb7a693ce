"""Families and models with one thing wrong each, for the tests of `diptych check`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from executor_service.models.llava import LlavaModel
from registry import (
    INPUT_REGISTRY,
    MULTIMODAL_REGISTRY,
    DummyData,
    ItemLayout,
    MediaInfo,
    PlaceholderRange,
    ProcessorInputs,
    Run,
    SupportsMultiModal,
)
from registry.checks.probes import noise_item
from registry.hooks import Hooks, hooks_of
from registry.models import llava, llava_next

PLUGIN = "a_broken_plugin"
DECORATORS = {
    "layout": MULTIMODAL_REGISTRY.register_image_layout,
    "mapper": MULTIMODAL_REGISTRY.register_image_input_mapper,
    "max_tokens": MULTIMODAL_REGISTRY.register_max_image_tokens,
    "dummy": INPUT_REGISTRY.register_dummy_data,
    "processor": INPUT_REGISTRY.register_input_processor,
}


@contextmanager
def plugin(of: Any = llava, model: str | None = None, architecture: str | None = None, **hooks: Any) -> Iterator[str]:
    """The name of a module whose family is that of `of`, but for `hooks`, `model` and `architecture`."""
    original = of.LlavaForConditionalGeneration if of is llava else of.LlavaNextForConditionalGeneration
    members = {
        "__module__": PLUGIN,
        "architectures": (architecture or original.__name__,),
        "executor_model": f"{__name__}:{model}" if model else original.executor_model,
    }
    cls = type("Broken", (SupportsMultiModal,), members)
    for name, hook in {"layout": of.layout, "mapper": of.map_image, **hooks}.items():
        DECORATORS[name](hook)(cls)
    module = ModuleType(PLUGIN)
    module.Broken = cls  # type: ignore[attr-defined]
    sys.modules[PLUGIN] = module
    try:
        yield PLUGIN
    finally:
        del sys.modules[PLUGIN]


def hooks_of_plugin() -> Hooks:
    """What the present plugin registered."""
    return hooks_of(sys.modules[PLUGIN].Broken)


def one_more(ctx, media):
    """A token too many where the height is a multiple of 97."""
    layout = llava.layout(ctx, media)
    if media.height % 97:
        return layout
    (run,) = layout.replacement
    return type(layout)([type(run)(run.token_id, run.count + 1)], layout.tensors)


def large_ones_are_endless(ctx, media):
    layout = llava.layout(ctx, media)
    return layout if media.height < 4000 else ItemLayout((Run(3, 10**12),), layout.tensors)


def breaks_of_no_vocabulary(ctx, media):
    """A row break that the embedding does not have, where the height is large."""
    layout = llava.layout(ctx, media)
    if media.height <= 1000:
        return layout
    return ItemLayout((*layout.replacement, Run(100_000, 1, is_feature=False)), layout.tensors)


def starts_with_a_token(ctx, media):
    """As many features as there should be, behind a token that transformers does not put there."""
    layout = llava.layout(ctx, media)
    return ItemLayout((Run(4, 1, is_feature=False), *layout.replacement), layout.tensors)


def one_picture(ctx, seq_len, counts):
    return DummyData([3, *[5] * seq_len], [noise_item(MediaInfo.image(1, 1))])


def several_pictures(ctx, seq_len, counts):
    return DummyData([*[3] * counts["image"], *[5] * seq_len], [noise_item(MediaInfo.image(1, 1))] * counts["image"])


def fewer_behind_the_first(ctx, inputs):
    """Every picture but the first becomes fifteen tokens."""
    ids: list[int] = []
    ranges: list[PlaceholderRange] = []
    for token in inputs.prompt_token_ids:
        count = 1 if token != 3 else 15 if ranges else 16
        if token == 3:
            ranges.append(PlaceholderRange(len(ids), count))
        ids += [token] * count
    return ProcessorInputs(ids, inputs.media, ranges)


def ranges_off_by_one(ctx, inputs):
    """The right ids, and ranges that leave each item's first token out."""
    right = sixteen_each(ctx, inputs)
    ranges = [PlaceholderRange(place.offset + 1, place.length - 1) for place in right.placeholders]
    return ProcessorInputs(right.prompt_token_ids, inputs.media, ranges)


def sixteen_each(ctx, inputs):
    """Every picture becomes sixteen tokens."""
    ids: list[int] = []
    ranges = []
    for token in inputs.prompt_token_ids:
        if token == 3:
            ranges.append(PlaceholderRange(len(ids), 16))
        ids += [token] * (16 if token == 3 else 1)
    return ProcessorInputs(ids, inputs.media, ranges)


def without_rows(ctx, item):
    return {"pixel_values": llava.map_image(ctx, item)["pixel_values"][:, 1:]}


def large_without_tile(ctx, item):
    """A tile too few of what is larger than a small photograph."""
    tensors = llava_next.map_image(ctx, item)
    height, width = item.info.size
    if height * width <= 1_100_000:
        return tensors
    return {**tensors, "pixel_values": tensors["pixel_values"][:-1]}


def without_lines(ctx, item):
    if sorted(item.info.size) == [1, 8192]:
        raise ValueError("so long")
    return llava.map_image(ctx, item)


def with_masks(ctx, item):
    return {**llava.map_image(ctx, item), "masks": np.ones((56, 56), bool)}


ODD_SIZE = (555, 444)
"""A size that no other stage maps."""


def all_but_odd(ctx, item):
    if item.info.size == ODD_SIZE:
        raise ValueError("so odd")
    return llava.map_image(ctx, item)


def as_floats(ctx, item):
    return {"pixel_values": llava.map_image(ctx, item)["pixel_values"].astype(np.float32)}


def sizes_swapped(ctx, item):
    return {**llava_next.map_image(ctx, item), "image_sizes": np.array(item.info.size[::-1])}


def wide_ones_fail(ctx, media):
    if media.width > 8 * media.height:
        raise ZeroDivisionError("so wide")
    return llava.layout(ctx, media)


def never_twice(ctx, item):
    tile = llava.map_image(ctx, item)["pixel_values"]
    return {"pixel_values": np.random.default_rng().integers(0, 256, tile.shape, dtype=np.uint8)}


def channels_swapped(ctx, item):
    return {"pixel_values": np.ascontiguousarray(llava.map_image(ctx, item)["pixel_values"][::-1])}


class OneFeatureLess(LlavaModel):
    def embed_multimodal(self, pixel_values: list[Tensor]) -> list[Tensor]:
        return [features[1:] for features in super().embed_multimodal(pixel_values)]


class Backwards(LlavaModel):
    """Items that go through together come out in another order, where nobody can tell by their shape."""

    def embed_multimodal(self, pixel_values: list[Tensor]) -> list[Tensor]:
        features = super().embed_multimodal(pixel_values)
        return features[::-1] if len({one.shape for one in features}) == 1 else features


class NarrowLogits(LlavaModel):
    def compute_logits(self, rows):
        return super().compute_logits(rows)[:, :-3]


class OtherChoices(LlavaModel):
    """Right logits of whole prompts, and others of the few rows that tokens are chosen from."""

    def compute_logits(self, rows):
        logits = super().compute_logits(rows)
        return logits if len(rows) > 3 else -logits


class NoPositions(LlavaModel):
    def forward(self, input_ids, positions, inputs_embeds, **adapter):
        return super().forward(input_ids, torch.zeros_like(positions), inputs_embeds, **adapter)


class NoFeatures(LlavaModel):
    def forward(self, input_ids, positions, inputs_embeds, **adapter):
        return super().forward(input_ids, positions, self.get_input_embeddings()(input_ids), **adapter)


class NoLogits(torch.nn.Module):
    def get_input_embeddings(self): ...

    def embed_multimodal(self, pixel_values): ...

    def forward(self, input_ids, positions, inputs_embeds): ...


class NoPixels(LlavaModel):
    def embed_multimodal(self, images: list[Tensor]) -> list[Tensor]:  # type: ignore[override]
        return super().embed_multimodal(images)


class NeedsMasks(LlavaModel):
    def embed_multimodal(self, pixel_values: list[Tensor], masks: list[Tensor]) -> list[Tensor]:  # type: ignore[override]
        return super().embed_multimodal(pixel_values)


class TwoArguments(LlavaModel):
    def forward(self, positions, inputs_embeds):  # type: ignore[override]
        return super().forward(positions, positions, inputs_embeds)


class NeedsMore(LlavaModel):
    def __init__(self, ctx) -> None:
        super().__init__(ctx)
        self.more = torch.nn.Linear(2, 2)


class StepsDiffer(LlavaModel):
    """Its answer depends on how the prompt is cut."""

    def forward(self, input_ids, positions, inputs_embeds, **adapter):
        hidden = super().forward(input_ids, positions, inputs_embeds, **adapter)
        return hidden + hidden.mean(dim=0)
