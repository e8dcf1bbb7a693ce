"""A bound family holds every hook to its contract, and says what is wrong where one breaks it."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from registry import (
    MULTIMODAL_REGISTRY,
    DummyData,
    ItemLayout,
    MediaInfo,
    MediaLimits,
    PlaceholderRange,
    ProcessorInputs,
    Run,
    SupportsMultiModal,
    TensorSpec,
)
from registry.errors import (
    CheckpointError,
    InvalidHookError,
    MediaSizeError,
    MissingHookError,
    PlaceholderMismatchError,
    TooManyItemsError,
    UnknownModalityError,
)
from registry.family import ModelFamily
from tests.registry.synthetic import LEFT_OUT, image, layout, make_class, make_family, map_item


def exactly(text: str) -> str:
    return f"^{re.escape(text)}$"


# --- input mappers --------------------------------------------------------------------------------


def family_mapping(ctx, spec: TensorSpec, emitted: dict, constants: dict | None = None) -> ModelFamily:
    """A family whose layout names one tensor, `x`, and whose mapper emits `emitted`."""
    return make_family(
        ctx,
        layout=lambda ctx, media: ItemLayout((Run(3, 1),), {"x": spec}, constants or {}),
        mapper=lambda ctx, item: emitted,
    )


@pytest.mark.parametrize(
    ("shape", "emitted"), [((2, 3), (2, 3)), ((2, 3), (1, 2, 3)), ((1, 2, 3), (1, 2, 3)), ((), ()), ((), (1,))], ids=str
)
def test_a_leading_batch_axis_is_dropped_where_the_layout_has_none(ctx, shape, emitted) -> None:
    values = np.arange(np.prod(emitted, dtype=int), dtype=np.int32).reshape(emitted)
    mapped = family_mapping(ctx, TensorSpec("int32", shape), {"x": values}).map_item(image(4, 5))
    assert mapped["x"].shape == shape
    np.testing.assert_array_equal(mapped["x"].ravel(), values.ravel())


def test_arrays_come_out_contiguous(ctx) -> None:
    turned = np.arange(6, dtype=np.uint8).reshape(2, 3).T
    family = family_mapping(ctx, TensorSpec("uint8", (3, 2)), {"x": turned})
    assert family.map_item(image(4, 5))["x"].flags.c_contiguous
    without_layout = make_family(ctx, layout=LEFT_OUT, mapper=lambda *_: {"x": turned}, **BY_HAND)
    assert without_layout.map_item(image(4, 5))["x"].flags.c_contiguous


@pytest.mark.parametrize(
    ("emitted", "found"),
    [
        (np.zeros((3, 2), np.uint8), "uint8 [3, 2]"),
        (np.zeros((2, 2, 3), np.uint8), "uint8 [2, 2, 3]"),
        (np.zeros((2, 3), np.float32), "float32 [2, 3]"),
        (np.zeros((1, 1, 2, 3), np.uint8), "uint8 [1, 1, 2, 3]"),
    ],
    ids=["shape", "batch of 2", "dtype", "two leading axes"],
)
def test_another_shape_or_dtype(ctx, emitted, found: str) -> None:
    family = family_mapping(ctx, TensorSpec("uint8", (2, 3)), {"x": emitted})
    info = image(4, 5).info
    message = f"Toy: the input mapper's x is {found} for {info}; the layout says uint8 [2, 3]"
    with pytest.raises(InvalidHookError, match=exactly(message)):
        family.map_item(image(4, 5))


def test_a_keyword_the_layout_does_not_name(ctx) -> None:
    x = np.zeros(2, np.uint8)
    family = family_mapping(ctx, TensorSpec("uint8", (2,)), {"x": x, "z": x, "y": x})
    message = "Toy: the input mapper emits y, z, which the layout does not name; it names x"
    with pytest.raises(InvalidHookError, match=exactly(message)):
        family.map_item(image(4, 5))


def test_a_missing_keyword(ctx) -> None:
    message = "Toy: the input mapper does not emit x, which the layout names"
    with pytest.raises(InvalidHookError, match=exactly(message)):
        family_mapping(ctx, TensorSpec("uint8", (2,)), {}).map_item(image(4, 5))


@pytest.mark.parametrize("emitted", [[7, 8], [[7, 8]]], ids=["as it is", "with a batch axis"])
def test_equal_constants_are_dropped(ctx, emitted) -> None:
    x = np.ones(2, np.uint8)
    family = family_mapping(
        ctx, TensorSpec("uint8", (2,)), {"x": x, "grid": np.array(emitted)}, {"grid": np.array([7, 8])}
    )
    assert list(family.map_item(image(4, 5))) == ["x"]


@pytest.mark.parametrize(("emitted", "shown"), [([7, 9], "[7, 9]"), ([7], "[7]")], ids=["value", "shape"])
def test_other_constants(ctx, emitted, shown: str) -> None:
    x = np.ones(2, np.uint8)
    family = family_mapping(
        ctx, TensorSpec("uint8", (2,)), {"x": x, "grid": np.array(emitted)}, {"grid": np.array([7, 8])}
    )
    message = (
        f"Toy: the input mapper's grid differs from the layout's for {image(4, 5).info}: {shown} instead of [7, 8]"
    )
    with pytest.raises(InvalidHookError, match=exactly(message)):
        family.map_item(image(4, 5))


def test_one_keyword_for_two_modalities(ctx) -> None:
    cls = make_class(layout=layout, mapper=map_item)
    MULTIMODAL_REGISTRY.register_video_layout(layout)(cls)
    family = ModelFamily(cls, ctx)
    family.layout(MediaInfo.image(4, 5))
    message = "Toy: both image and video items emit pixels; a keyword belongs to one modality"
    with pytest.raises(InvalidHookError, match=exactly(message)):
        family.layout(MediaInfo("video", height=4, width=5, num_frames=2))


# --- modalities and tokens ------------------------------------------------------------------------


@pytest.mark.parametrize("ask", ["max_tokens", "check_modality"])
def test_a_modality_the_family_does_not_support(ctx, ask: str) -> None:
    with pytest.raises(UnknownModalityError, match=r"^Toy does not support video items; it supports: image$"):
        getattr(make_family(ctx), ask)("video")


@pytest.mark.parametrize("info", [MediaInfo("video", height=4, width=5, num_frames=2), MediaInfo("audio")], ids=str)
def test_items_of_a_modality_the_family_does_not_support(ctx, info: MediaInfo) -> None:
    for ask in (lambda family: family.layout(info), lambda family: family.process(ProcessorInputs([3], [info]))):
        with pytest.raises(UnknownModalityError, match=f"^Toy does not support {info.modality} items"):
            ask(make_family(ctx))


def test_no_more_layouts_are_kept_than_a_few_thousand(ctx) -> None:
    """Sizes are the clients' choice."""
    family = make_family(ctx)
    for width in range(4, 4204):
        family.layout(MediaInfo.image(4, width))
    assert len(family._layouts) <= 4096


def test_tokens_of_the_family(ctx) -> None:
    family = make_family(ctx)
    assert family.modality_of_placeholder == {3: "image"}
    assert family.placeholder_texts == {"image": "<image>"}
    assert family.feature_token_ids == {3}
    assert family.text_token_id == 4


def test_a_placeholder_the_tokenizer_does_not_have(ctx, monkeypatch) -> None:
    family = make_family(ctx)
    monkeypatch.setattr(family.cls, "placeholder_token_id", lambda ctx, modality: 99999)
    with pytest.raises(CheckpointError, match=r"^Toy: the image placeholder is token 99999, which the tokenizer of"):
        _ = family.placeholder_texts


def test_placeholders_come_from_the_configuration(ctx) -> None:
    cls = type("Configured", (SupportsMultiModal,), {})
    assert cls.placeholder_token_id(ctx, "image") == ctx.model_config.image_token_index == 3
    with pytest.raises(CheckpointError, match=r"^Configured: the configuration of .* has no video_token_id; override"):
        cls.placeholder_token_id(ctx, "video")


# --- dummy data -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "count", "message"),
    [
        ([3, 3, 4], 1, "Toy: dummy data has 1 image items; 2 were asked for"),
        ([3] + [4] * 50, 2, "Toy: dummy data has 1 image placeholders; 2 were asked for"),
        ([3, 3, 4], 2, "Toy: dummy data has 7 tokens; at least 20 were asked for"),
    ],
    ids=["items", "placeholders", "tokens"],
)
def test_too_little_dummy_data(ctx, ids: list[int], count: int, message: str) -> None:
    family = make_family(ctx, dummy=lambda *_: DummyData(ids, [image(5, 5)] * count))
    with pytest.raises(InvalidHookError, match=exactly(message)):
        family.dummy_data(20, {"image": 2})


# --- families without a layout --------------------------------------------------------------------

BY_HAND = {
    "max_tokens": 5,
    "dummy": lambda ctx, seq_len, counts: DummyData([4] * seq_len, []),
    "processor": lambda ctx, inputs: inputs,
}
NAMES = {
    "mapper": "an input mapper",
    "max_tokens": "the maximum tokens",
    "dummy": "dummy data",
    "processor": "an input processor",
}


def test_a_family_without_a_layout_works_by_hand(ctx) -> None:
    family = make_family(ctx, layout=LEFT_OUT, mapper=lambda *_: {"whatever": np.ones((1, 2), np.int16)}, **BY_HAND)
    assert not family.has_layout("image")
    assert family.max_tokens("image") == 5
    assert family.map_item(image(4, 5))["whatever"].shape == (1, 2)
    assert family.dummy_data(8, {})[0].prompt_token_ids == [4] * 8
    with pytest.raises(MissingHookError, match=r"^Toy has no layout for image$"):
        family.layout(MediaInfo.image(4, 5))


@pytest.mark.parametrize(
    ("missing", "how"),
    [
        *[(hook, LEFT_OUT) for hook in NAMES],
        *[(hook, None) for hook in NAMES if hook != "mapper"],  # an empty mapper does not need a layout
    ],
)
def test_a_family_without_a_layout_needs_every_other_hook(ctx, missing: str, how) -> None:
    hooks = {"layout": LEFT_OUT, "mapper": map_item, **BY_HAND, missing: how}
    there = ", ".join(name for hook, name in NAMES.items() if hook != missing)
    message = f"Toy has no layout for image, so it must register {NAMES[missing]} by hand; registered: {there}"
    with pytest.raises(MissingHookError, match=exactly(message)):
        make_family(ctx, **hooks)


def test_a_mapper_alone_names_what_is_missing(ctx) -> None:
    with pytest.raises(
        MissingHookError, match=r"must register the maximum tokens by hand; registered: an input mapper$"
    ):
        make_family(ctx, layout=LEFT_OUT)


# --- prompts --------------------------------------------------------------------------------------


def test_each_replacement_takes_its_placeholders_place(ctx) -> None:
    """Two items of different shapes, at both ends of the prompt: separators count as length, not as features."""
    infos = [MediaInfo.image(10, 20), MediaInfo.image(25, 5)]
    inputs = make_family(ctx).process(ProcessorInputs([3, 11, 12, 3], infos))
    assert inputs.prompt_token_ids == [6, 3, 3, 7, 11, 12, 6, 3, 7, 3, 7, 3, 7]
    assert list(inputs.placeholders) == [PlaceholderRange(0, 4), PlaceholderRange(6, 7)]
    assert [(item.num_tokens, item.length) for item in inputs.layouts] == [(2, 4), (3, 7)]
    assert list(inputs.media) == infos


def test_a_prompt_without_items_stays_as_it_is(ctx) -> None:
    inputs = make_family(ctx).process(ProcessorInputs([11, 12], []))
    assert (inputs.prompt_token_ids, list(inputs.placeholders)) == ([11, 12], [])


@pytest.mark.parametrize(("ids", "count"), [([11], 1), ([3, 3], 1), ([3], 0), ([3, 3, 11], 4)])
def test_placeholders_and_items_differ_in_number(ctx, ids: list[int], count: int) -> None:
    found = ids.count(3)
    message = f"the prompt has {found} media placeholders and the request has {count} media items"
    with pytest.raises(PlaceholderMismatchError, match=exactly(message)) as caught:
        make_family(ctx).process(ProcessorInputs(ids, [MediaInfo.image(5, 5)] * count))
    assert (caught.value.limit, caught.value.actual) == (found, count)


def test_items_in_another_order_than_their_placeholders(ctx) -> None:
    cls = make_class(layout=layout)
    MULTIMODAL_REGISTRY.register_video_layout(lambda ctx, media: ItemLayout((Run(8, 2),), {}))(cls)
    family = ModelFamily(cls, ctx)
    picture, clip = MediaInfo.image(5, 5), MediaInfo("video", height=5, width=5, num_frames=2)
    assert family.process(ProcessorInputs([3, 8, 3], [picture, clip, picture])).prompt_token_ids.count(8) == 2
    message = "placeholder 1 of the prompt is for video, item 1 is image"
    with pytest.raises(PlaceholderMismatchError, match=exactly(message)) as caught:
        family.process(ProcessorInputs([3, 8, 3], [picture, picture, clip]))
    assert caught.value.item_index == 1


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limits", "counts", "limit"), [({}, {"image": 2}, 1), ({"image": 4}, {"image": 5}, 4)])
def test_too_many_items(limits: dict[str, int], counts: dict[str, int], limit: int) -> None:
    MediaLimits(limits).check_counts({"image": limit, "video": 1})
    message = (
        f"the prompt has {counts['image']} image items; at most {limit} are allowed "
        f"(--limit-mm-per-prompt image={limit})"
    )
    with pytest.raises(TooManyItemsError, match=exactly(message)) as caught:
        MediaLimits(limits).check_counts(counts)
    assert (caught.value.limit, caught.value.actual) == (limit, counts["image"])


@pytest.mark.parametrize(
    ("size", "message", "limit", "actual"),
    [
        ((101, 7), "the image is 101x7 pixels; its longer side may have at most 100", 100, 101),
        ((7, 101), "the image is 7x101 pixels; its longer side may have at most 100", 100, 101),
        ((60, 51), "the image has 3060 pixels (60x51); at most 3000 are allowed", 3000, 3060),
    ],
)
def test_too_large_an_image(size, message: str, limit: int, actual: int) -> None:
    limits = MediaLimits(max_image_side=100, max_image_pixels=3000)
    limits.check_size(MediaInfo.image(100, 30))
    limits.check_size(MediaInfo("audio", num_samples=10**9))
    with pytest.raises(MediaSizeError, match=exactly(message)) as caught:
        limits.check_size(MediaInfo.image(*size), item_index=2)
    assert (caught.value.limit, caught.value.actual, caught.value.item_index) == (limit, actual, 2)


def test_audio_has_no_size() -> None:
    with pytest.raises(ValueError, match=r"^audio has no height and width$"):
        _ = MediaInfo("audio").size


def test_limits_belong_to_the_context(ctx) -> None:
    assert ctx.limits.max_items("image") == 4
    assert replace(ctx, limits=MediaLimits()).limits.max_items("image") == 1
