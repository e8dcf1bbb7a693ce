"""A window of a resize is the same window of Pillow's resize, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from registry.models.resample import RESAMPLING, resize_window

SIDES = st.one_of(st.integers(1, 12), st.integers(1, 300))


@st.composite
def cases(draw):
    """Pixels, the new size, the window (left, top, right, bottom) and the filter."""
    height, width, new_height, new_width = (draw(SIDES) for _ in range(4))
    left, top = draw(st.integers(0, new_width - 1)), draw(st.integers(0, new_height - 1))
    window = (left, top, draw(st.integers(left + 1, new_width)), draw(st.integers(top + 1, new_height)))
    noise = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels = (noise > 127) * np.uint8(255) if draw(st.booleans()) else noise
    return pixels, (new_height, new_width), window, draw(st.sampled_from(RESAMPLING))


@settings(max_examples=400)
@given(cases())
def test_window_equals_pillow(case) -> None:
    check(*case)


@pytest.mark.parametrize("resample", RESAMPLING, ids=lambda resample: resample.name)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((300, 40), (90, 50)),
        ((300, 200), (100, 101)),
        ((300, 200), (100, 100)),
        ((40, 300), (50, 90)),
        ((9, 9), (9, 9)),
    ],
    ids=["vertical first", "just vertical first", "just horizontal first", "horizontal first", "same size"],
)
def test_order_of_the_passes(old, new, resample) -> None:
    """Each pass rounds, so their order shows in the pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (*old, 3), dtype=np.uint8)
    check(pixels, new, (3, 2, new[1] - 1, new[0] - 2), resample)


def check(pixels, size, window, resample) -> None:
    left, top, right, bottom = window
    whole = np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), resample))
    np.testing.assert_array_equal(resize_window(pixels, size, window, resample), whole[top:bottom, left:right])


def test_a_window_of_a_huge_line() -> None:
    """The middle of 1 x 2752512 pixels, where a running sum of steps has had time to drift."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, 8192, 3), dtype=np.uint8)
    for resample in RESAMPLING:
        check(pixels, (1, 8192 * 336), (8192 * 168, 0, 8192 * 168 + 336, 1), resample)
