"""The decorators: empty or with arguments, by modality or in shorthand, once or twice, on the right kind of class."""

from __future__ import annotations

import numpy as np
import pytest

from registry import (
    INPUT_REGISTRY,
    MULTIMODAL_REGISTRY,
    DummyData,
    ItemLayout,
    PlaceholderRange,
    ProcessorInputs,
    Run,
    TensorSpec,
)
from registry.errors import MissingHookError, UnknownModalityError
from registry.family import ModelFamily
from registry.hooks import hooks_of
from tests.registry.synthetic import LEFT_OUT, Toy, image, layout, make_class, make_family, map_item

MODALITIES = ["image", "video", "audio"]


def hf_layout(ctx, media) -> ItemLayout:
    """For the default mapper: the checkpoint's processor gives one float tile."""
    return ItemLayout((Run(3, 5),), {"pixel_values": TensorSpec("float32", (3, 56, 56))})


@pytest.mark.parametrize("hook", [LEFT_OUT, None], ids=["left out", "empty"])
def test_empty_equals_left_out(ctx, hook) -> None:
    family = make_family(ctx, layout=hf_layout, mapper=hook, max_tokens=hook, dummy=hook, processor=hook)
    expected = ctx.image_processor(images=[image(30, 40).data], return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(family.map_item(image(30, 40))["pixel_values"], expected)
    assert family.max_tokens("image") == 5
    assert family.process(ProcessorInputs([1, 3, 2], [image(1, 1).info])).prompt_token_ids == [1, 3, 3, 3, 3, 3, 2]
    inputs, items = family.dummy_data(40, {"image": 2})
    assert (len(inputs.prompt_token_ids), len(items)) == (40, 2)


def test_every_argument_is_used(ctx) -> None:
    calls = []

    def mapper(given, item):
        calls.append(("mapper", given, item.info))
        return map_item(given, item)

    def dummy(given, seq_len, counts):
        calls.append(("dummy", given, seq_len, dict(counts)))
        return DummyData([3, 4, 4, 4, 4], [image(10, 10)])

    def processor(given, inputs):
        calls.append(("processor", given, list(inputs.prompt_token_ids)))
        return ProcessorInputs([*inputs.prompt_token_ids, 5], inputs.media, [PlaceholderRange(0, 1)])

    def max_tokens(given):
        calls.append(("max", given))
        return 77

    family = make_family(ctx, mapper=mapper, max_tokens=max_tokens, dummy=dummy, processor=processor)
    item = image(10, 20)
    assert list(family.map_item(item)) == ["pixels"]
    assert family.max_tokens("image") == 77
    inputs, items = family.dummy_data(6, {"image": 1})
    assert inputs.prompt_token_ids == [3, 4, 4, 4, 4, 5]
    assert [i.info for i in items] == [image(10, 10).info]
    assert calls == [
        ("mapper", ctx, item.info),
        ("max", ctx),
        ("dummy", ctx, 6, {"image": 1}),
        ("processor", ctx, [3, 4, 4, 4, 4]),
    ]


def test_maximum_as_a_number(ctx) -> None:
    assert make_family(ctx, max_tokens=1234).max_tokens("image") == 1234


def test_dummy_data_may_be_a_plain_tuple(ctx) -> None:
    family = make_family(ctx, dummy=lambda ctx, seq_len, counts: ([3] + [4] * seq_len, [image(5, 5)]))
    inputs, items = family.dummy_data(9, {"image": 1})
    assert inputs.prompt_token_ids == [6, 3, 7] + [4] * 9
    assert len(items) == 1


@pytest.mark.parametrize("modality", MODALITIES)
def test_shorthand_equals_the_general_form(modality: str) -> None:
    general, shorthand = type("General", (Toy,), {}), type("Shorthand", (Toy,), {})
    registry = MULTIMODAL_REGISTRY
    registry.register_item_layout(modality, layout)(general)
    registry.register_input_mapper(modality, map_item)(general)
    registry.register_max_multimodal_tokens(modality, 9)(general)
    getattr(registry, f"register_{modality}_layout")(layout)(shorthand)
    getattr(registry, f"register_{modality}_input_mapper")(map_item)(shorthand)
    getattr(registry, f"register_max_{modality}_tokens")(9)(shorthand)
    assert hooks_of(general) == hooks_of(shorthand)
    assert hooks_of(general).layouts == {modality: layout}
    assert hooks_of(general).input_mappers == {modality: map_item}
    assert hooks_of(general).max_tokens == {modality: 9}


def test_a_decorator_gives_the_class_back() -> None:
    cls = type("Plain", (Toy,), {})
    assert INPUT_REGISTRY.register_dummy_data()(cls) is cls
    assert MULTIMODAL_REGISTRY.register_image_layout(layout)(cls) is cls


REGISTRATIONS = {
    "the image layout": (MULTIMODAL_REGISTRY.register_image_layout, lambda hooks: hooks.layouts["image"]),
    "the image input mapper": (
        MULTIMODAL_REGISTRY.register_image_input_mapper,
        lambda hooks: hooks.input_mappers["image"],
    ),
    "the maximum image tokens": (
        MULTIMODAL_REGISTRY.register_max_image_tokens,
        lambda hooks: hooks.max_tokens["image"],
    ),
    "dummy data": (INPUT_REGISTRY.register_dummy_data, lambda hooks: hooks.dummy_data),
    "the input processor": (INPUT_REGISTRY.register_input_processor, lambda hooks: hooks.input_processor),
}


@pytest.mark.parametrize("what", REGISTRATIONS)
def test_registering_twice_warns_and_overwrites(what: str) -> None:
    register, hook_of = REGISTRATIONS[what]
    cls, first, second = type("Twice", (Toy,), {}), lambda *_: 1, lambda *_: 2
    register(first)(cls)
    with pytest.warns(UserWarning, match=f"^Twice: {what} is registered twice; the later one counts$") as warned:
        register(second)(cls)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert hook_of(hooks_of(cls)) is second


@pytest.mark.parametrize("what", REGISTRATIONS)
def test_another_class_or_modality_is_not_twice(what: str) -> None:
    register, _ = REGISTRATIONS[what]
    register(layout)(type("One", (Toy,), {}))
    register(layout)(type("Other", (Toy,), {}))


@pytest.mark.parametrize("what", REGISTRATIONS)
@pytest.mark.parametrize("target", [type("Stranger", (), {}), lambda: None], ids=["class", "function"])
def test_only_families_can_be_decorated(what: str, target) -> None:
    register, _ = REGISTRATIONS[what]
    message = f"^{what} is registered for {target.__name__}, which does not implement SupportsMultiModal$"
    with pytest.raises(TypeError, match=message):
        register(layout)(target)


@pytest.mark.parametrize(
    "register",
    [
        lambda: MULTIMODAL_REGISTRY.register_item_layout("smell", layout),
        lambda: MULTIMODAL_REGISTRY.register_input_mapper("smell"),
        lambda: MULTIMODAL_REGISTRY.register_max_multimodal_tokens("smell", 3),
    ],
    ids=["layout", "mapper", "maximum"],
)
def test_unknown_modality(register) -> None:
    with pytest.raises(
        UnknownModalityError, match=r"^unknown modality 'smell'; the modalities are image, video, audio$"
    ):
        register()


def test_hooks_are_not_inherited(ctx) -> None:
    child = type("Child", (make_class(layout=layout, mapper=map_item),), {})
    with pytest.raises(
        MissingHookError, match=r"^Child registers nothing; a family needs a layout or an input mapper$"
    ):
        ModelFamily(child, ctx)
