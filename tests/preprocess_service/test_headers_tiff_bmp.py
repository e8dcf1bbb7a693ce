"""TIFF and BMP headers against the reference."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.preprocess_service.header_files import (
    ENTRIES,
    SIZE,
    Entry,
    assert_compatible,
    assert_same,
    directory,
    examples,
    grow,
    picture,
    probe,
    saved,
    tiff_header,
)

pytestmark = pytest.mark.usefixtures("small_pixel_limit")


def test_top_down_bmp() -> None:
    data = bytearray(saved(picture(), "BMP"))
    data[22:26] = struct.pack("<l", -SIZE[1])
    assert_same(bytes(data))


def test_os2_bmp() -> None:
    pixels = bytes(SIZE[1] * 12)
    core = struct.pack("<LHHHH", 12, *SIZE, 1, 24)
    assert_same(b"BM" + struct.pack("<LLL", 26 + len(pixels), 0, 26) + core + pixels)


@examples(300)
@given(ENTRIES, st.sampled_from("<>"))
def test_tiff_directories(entries: list[Entry], order: str) -> None:
    def short(tag: int, value: int) -> Entry:
        return tag, 3, 1, struct.pack(order + "H", value)

    start = 8 + 2 + 12 * (len(entries) + 5) + 4
    size = [short(256, SIZE[0]), short(257, SIZE[1]), short(258, 8), short(262, 1), short(273, start)]
    data = tiff_header(order) + directory(entries + size, order) + bytes(64)
    assert_compatible(data)
    assert grow(data) == probe(data)
