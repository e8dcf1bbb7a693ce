"""The default maximum is the true one, and default dummy data holds it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from registry import InputContext, ItemLayout, MediaInfo, MediaLimits, Run, TensorSpec
from registry.defaults.max_tokens import candidate_sides, find_largest_image
from tests.registry.synthetic import layout, make_family

Count = Callable[[int, int], int]
PINPOINTS = [(24, 48), (48, 24), (48, 48), (72, 24), (24, 72)]


def patches(height: int, width: int) -> int:
    return max(height // 14, 1) * max(width // 14, 1)


def rows(height: int, width: int) -> int:
    """Padded cells that are no squares, and a token behind every row: tall beats wide."""
    return -(-height // 9) * (-(-width // 5) + 1)


def fitted(height: int, width: int) -> int:
    """Shrunk into a square first: the largest picture is not the largest layout."""
    scale = min(1.0, 40 / max(height, width))
    return max(1, int(height * scale) // 3) * max(1, int(width * scale) // 3)


def smart(factor: int, fewest: int, most: int) -> Count:
    """Sides rounded to `factor`, pixels between two bounds: Qwen2-VL's resize."""

    def count(height: int, width: int) -> int:
        sides = [max(factor, round(side / factor) * factor) for side in (height, width)]
        if math.prod(sides) > most:
            shrink = math.sqrt(height * width / most)
            sides = [max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)]
        elif math.prod(sides) < fewest:
            grow = math.sqrt(fewest / (height * width))
            sides = [math.ceil(side * grow / factor) * factor for side in (height, width)]
        return math.prod(side // factor for side in sides)

    return count


def anyres(height: int, width: int) -> int:
    """The best of a few canvases, its padding cut off again, a newline per row: LLaVA-NeXT's counting."""

    def quality(canvas: tuple[int, int]) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - math.prod(canvas)

    across, down = (side // 2 for side in reversed(max(PINPOINTS, key=quality)))
    if width * down > across * height:
        down -= (down - height * across // width) // 2 * 2
    else:
        across -= (across - width * down // height) // 2 * 2
    return down * (across + 1) + 144


COUNTS: dict[str, Count] = {
    "patches": patches,
    "rows": rows,
    "fitted": fitted,
    "smart": smart(4, 16, 600),
    "smart, large": smart(7, 49, 2000),
    "anyres": anyres,
}


def limited(ctx: InputContext, side: int, pixels: int, **processor_config: object) -> InputContext:
    limits = MediaLimits({"image": 4}, max_image_side=side, max_image_pixels=pixels)
    return replace(ctx, limits=limits, processor_config=processor_config)


@pytest.mark.parametrize("limits", [(96, 10**6), (96, 3000), (200, 12345), (130, 1000)], ids=str)
@pytest.mark.parametrize("name", COUNTS)
def test_search_finds_the_true_maximum(ctx, name: str, limits: tuple[int, int]) -> None:
    count, (side, pixels) = COUNTS[name], limits
    small = limited(ctx, side, pixels, image_grid_pinpoints=PINPOINTS, size={"height": 24, "width": 24})
    allowed = [(h, w) for h in range(1, side + 1) for w in range(1, side + 1) if h * w <= pixels]
    family = make_family(small, layout=lambda ctx, media: ItemLayout((Run(3, count(*media.size)),), {}))
    assert family.max_tokens("image") == max(count(*size) for size in allowed)
    assert family.find_largest("image", "num_tokens").size in allowed


@pytest.mark.parametrize("peak", [(77, 61), (1, 100), (100, 3), (50, 50)], ids=str)
def test_search_climbs_to_a_peak_between_the_candidates(ctx, peak: tuple[int, int]) -> None:
    """A slope leads there; no candidate side is near it."""

    def slope(ctx: InputContext, media: MediaInfo) -> ItemLayout:
        distance = max(abs(side - top) for side, top in zip(media.size, peak, strict=True))
        return ItemLayout((Run(3, 1000 - distance),), {})

    assert make_family(limited(ctx, 100, 10**6), layout=slope).find_largest("image", "num_tokens").size == peak


def test_candidate_sides(ctx) -> None:
    """What the processor names, each with its neighbours; powers of two; both ends of what is allowed."""
    named = limited(
        ctx, 1000, 10**6, size={"shortest_edge": 336}, crop_size=51, image_grid_pinpoints=[[90, 700]], do_resize=True
    )
    powers = {1 << exponent for exponent in range(10)}
    around = {side + delta for side in (336, 51, 90, 700) for delta in (-1, 0, 1)}
    assert set(candidate_sides(named)) == powers | around | {1000}
    nested = limited(ctx, 1000, 10**6, image_processor={"size": {"shortest_edge": 336}})
    assert {335, 336, 337} <= set(candidate_sides(nested))


def test_ties_go_to_the_smallest_image(ctx) -> None:
    found = find_largest_image(ctx, lambda info: ItemLayout((Run(3, 5),), {}), lambda item: (item.num_tokens,))
    assert found.size == (1, 1)


# --- dummy data -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COUNTS)
def test_dummy_data_holds_the_maximum(ctx, name: str) -> None:
    small = limited(ctx, 96, 3000)
    family = make_family(small, layout=lambda ctx, media: ItemLayout((Run(3, COUNTS[name](*media.size)),), {}))
    inputs, items = family.dummy_data(10, {"image": 3})
    maximum = family.max_tokens("image")
    assert inputs.prompt_token_ids.count(3) == 3 * maximum
    assert [item.num_tokens for item in inputs.layouts] == [maximum] * 3
    assert [(item.data.height, item.data.width) for item in items] == [item.info.size for item in items]
    assert {item.data.mode for item in items} == {"RGB"}


def test_of_equally_large_items_the_one_with_more_tokens_counts(ctx) -> None:
    """Every item has one tile, as in anyres families whose canvases have equally many."""
    tile = {"pixels": TensorSpec("uint8", (3, 8, 8))}
    family = make_family(
        limited(ctx, 96, 3000), layout=lambda ctx, media: ItemLayout((Run(3, patches(*media.size)),), tile)
    )
    assert family.find_largest("image", "num_bytes") == family.find_largest("image", "num_tokens")


def test_dummy_data_holds_the_most_bytes_too(ctx) -> None:
    """Features grow with height, bytes fall."""

    def lopsided(ctx: InputContext, media: MediaInfo) -> ItemLayout:
        return ItemLayout((Run(3, media.height),), {"pixels": TensorSpec("uint8", (65 - media.height,))})

    _, items = make_family(limited(ctx, 64, 10**6), layout=lopsided).dummy_data(10, {"image": 3})
    assert [item.info.height for item in items] == [64, 1, 64]


def test_the_maximum_counts_features_and_no_separators(ctx) -> None:
    """The longest item is not the one with most features."""

    def striped(ctx: InputContext, media: MediaInfo) -> ItemLayout:
        return ItemLayout((Run(3, media.height), Run(9, 5 * (64 - media.height), is_feature=False)), {})

    family = make_family(limited(ctx, 64, 10**6), layout=striped)
    assert family.max_tokens("image") == 64
    assert family.find_largest("image", "length").height == 1


@pytest.mark.parametrize(("seq_len", "count"), [(1, 0), (50, 0), (50, 1), (2000, 2), (3, 1)])
def test_dummy_data_is_padded_with_text(ctx, seq_len: int, count: int) -> None:
    """At least `seq_len` tokens, the last of them text: something is there to be answered."""
    family = make_family(limited(ctx, 30, 10**6), layout=layout)
    inputs, items = family.dummy_data(seq_len, {"image": count})
    replacement = 1 + 3 * (3 + 1)
    assert len(items) == count
    assert len(inputs.prompt_token_ids) == max(seq_len, count * replacement + 1)
    assert inputs.prompt_token_ids[-1] == family.text_token_id


def test_dummy_data_of_llava(family) -> None:
    inputs, items = family.dummy_data(100, {"image": 4})
    assert inputs.prompt_token_ids.count(3) == 4 * 16
    assert len(inputs.prompt_token_ids) == 100
    assert {family.map_item(item)["pixel_values"].shape for item in items} == {(3, 56, 56)}
