"""GIF headers against the reference."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.preprocess_service.header_files import (
    GIF_EXTENSIONS,
    assert_compatible,
    assert_same,
    examples,
    gif_with,
    grow,
    picture,
    probe,
    saved,
)

pytestmark = pytest.mark.usefixtures("small_pixel_limit")


def test_gif_frame_larger_than_its_screen() -> None:
    data = bytearray(saved(picture("P"), "GIF"))
    data[6:10] = struct.pack("<HH", 1, 1)
    assert_same(bytes(data))


@pytest.mark.parametrize("extension", GIF_EXTENSIONS)
def test_gif_extensions(extension: bytes) -> None:
    assert_same(gif_with(extension))


@examples(300)
@given(st.lists(st.one_of(st.sampled_from(GIF_EXTENSIONS), st.binary(max_size=6)), max_size=5))
def test_gif_blocks(extensions: list[bytes]) -> None:
    data = gif_with(b"".join(extensions))
    assert_compatible(data)
    assert grow(data) == probe(data)
