"""What hooks return is held to its types and bounds before anything is made of it."""

from __future__ import annotations

import re

import numpy as np
import pytest

from registry import ItemLayout, MediaInfo, ProcessorInputs, Run, TensorSpec
from registry.errors import InvalidHookError
from tests.registry.synthetic import image, make_family


def exactly(text: str) -> str:
    return f"^{re.escape(text)}$"


@pytest.mark.parametrize("replacement", [(), (Run(3, 0),)], ids=["no runs", "no tokens"])
def test_an_empty_replacement(ctx, replacement) -> None:
    family = make_family(ctx, layout=lambda ctx, media: ItemLayout(replacement, {}))
    with pytest.raises(InvalidHookError, match=r"^Toy: the layout of MediaInfo\(.*\) has an empty replacement$"):
        family.layout(MediaInfo.image(4, 5))


def test_a_dtype_the_wire_does_not_know(ctx) -> None:
    family = make_family(ctx, layout=lambda *_: ItemLayout((Run(3, 1),), {"x": TensorSpec("complex64", (1,))}))
    with pytest.raises(
        InvalidHookError,
        match=r"^Toy: the layout of .*: x has dtype 'complex64'; the wire knows bool, uint8, .*float64$",
    ):
        family.layout(MediaInfo.image(4, 5))


@pytest.mark.parametrize(
    ("runs", "found"),
    [
        ((Run(3, 16.0),), "has a run of 16.0 tokens; an int of at least 0 is expected"),
        ((Run(3, True),), "has a run of True tokens; an int of at least 0 is expected"),
        ((Run(3, 20), Run(3, -4)), "has a run of -4 tokens; an int of at least 0 is expected"),
        ((Run(-5, 1),), "has token id -5; an int of at least 0 and below 4294967296 is expected"),
        ((Run(3.0, 1),), "has token id 3.0; an int of at least 0 and below 4294967296 is expected"),
        ((Run(3, 1), Run(328, 1, False)), "has token id 328; an int of at least 0 and below 328 is expected"),
        ((Run(3, 1), Run(-5, 1, False)), "has token id -5; an int of at least 0 and below 328 is expected"),
        ((Run(3, (1 << 24) - 1), Run(4, 2, False)), "has 16777217 tokens; at most 16777216 are allowed"),
        ((Run(3, 10**12),), "has 1000000000000 tokens; at most 16777216 are allowed"),
    ],
    ids=str,
)
def test_runs_that_cannot_be_counted_or_looked_up(ctx, runs, found: str) -> None:
    info = MediaInfo.image(4, 5)
    with pytest.raises(InvalidHookError, match=exactly(f"Toy: the layout of {info} {found}")):
        make_family(ctx, layout=lambda *_: ItemLayout(runs, {})).layout(info)


def test_runs_up_to_the_last_token_and_of_ids_that_only_features_have(ctx) -> None:
    runs = (Run(100_000, (1 << 24) - 1), Run(327, 1, False))
    assert make_family(ctx, layout=lambda *_: ItemLayout(runs, {})).layout(MediaInfo.image(4, 5)).length == 1 << 24


@pytest.mark.parametrize("shape", [(3, 0), (-1,), (2.0, 3), (True,), [3, 2], (np.int64(3),)], ids=str)
def test_shapes_that_no_tensor_of_an_item_has(ctx, shape) -> None:
    info = MediaInfo.image(4, 5)
    found = f"x has shape {shape!r}; a tuple of ints of at least 1 is expected"
    with pytest.raises(InvalidHookError, match=exactly(f"Toy: the layout of {info}: {found}")):
        make_family(ctx, layout=lambda *_: ItemLayout((Run(3, 1),), {"x": TensorSpec("uint8", shape)})).layout(info)


@pytest.mark.parametrize(("result", "name"), [(None, "NoneType"), ({"replacement": []}, "dict")])
def test_a_layout_that_is_none(ctx, result, name: str) -> None:
    info = MediaInfo.image(4, 5)
    with pytest.raises(
        InvalidHookError, match=exactly(f"Toy: the layout of {info} returned {name}; an ItemLayout is expected")
    ):
        make_family(ctx, layout=lambda *_: result).layout(info)


@pytest.mark.parametrize(
    ("maximum", "found"),
    [(0, "0"), (-3, "-3"), (lambda ctx: 0, "0"), (float("nan"), "nan"), (7.0, "7.0"), ("many", "'many'"),
     (lambda ctx: None, "None"), (10**15, "1000000000000000")],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)  # fmt: skip
def test_a_maximum_that_is_no_number_of_tokens(ctx, maximum, found: str) -> None:
    message = f"Toy: the maximum image tokens is {found}; it must be an int from 1 to 16777216"
    with pytest.raises(InvalidHookError, match=exactly(message)):
        make_family(ctx, max_tokens=maximum).max_tokens("image")


def test_a_layout_without_features_has_no_maximum(ctx) -> None:
    family = make_family(ctx, layout=lambda *_: ItemLayout((Run(6, 2, False),), {}))
    with pytest.raises(InvalidHookError, match="the maximum image tokens is 0"):
        family.max_tokens("image")


@pytest.mark.parametrize(("emitted", "found"), [(None, "NoneType"), ([1], "list")])
def test_a_mapper_without_names(ctx, emitted, found: str) -> None:
    message = f"Toy: the image input mapper returned {found}; a Mapping is expected"
    with pytest.raises(InvalidHookError, match=exactly(message)):
        make_family(ctx, mapper=lambda *_: emitted).map_item(image(4, 5))


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (None, "the dummy data returned NoneType; a tuple is expected"),
        (([4],), "the dummy data returned 1 values; token ids and items are expected"),
        (("ids", []), "the dummy data, for its token ids, returned str; a list is expected"),
    ],
    ids=["nothing", "one value", "no ids"],
)
def test_dummy_data_that_is_none(ctx, data, found: str) -> None:
    with pytest.raises(InvalidHookError, match=exactly(f"Toy: {found}")):
        make_family(ctx, dummy=lambda *_: data).dummy_data(20, {"image": 1})


def test_an_input_processor_that_returns_nothing(ctx) -> None:
    message = "Toy: the input processor returned NoneType; a ProcessorInputs is expected"
    with pytest.raises(InvalidHookError, match=exactly(message)):
        make_family(ctx, processor=lambda *_: None).process(ProcessorInputs([4], []))
