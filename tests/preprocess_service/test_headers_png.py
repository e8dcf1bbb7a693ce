"""PNG headers against the reference."""

from __future__ import annotations

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocess_service.media.headers import ImageHeader, probe_image
from tests.preprocess_service.header_files import (
    ACTL,
    EXIF_WITHOUT,
    FCTL,
    IEND,
    NEXT_FCTL,
    PACKED_XMP,
    RAW_KEY,
    SIZE,
    XMP_KEY,
    assert_compatible,
    chunk,
    examples,
    exif,
    grow,
    international_chunk,
    packed_text_chunk,
    picture,
    png,
    probe,
    raw_profile,
    saved,
    text_chunk,
)

pytestmark = pytest.mark.usefixtures("small_pixel_limit")


def test_the_file_extension_of_a_square_image_does_not_matter() -> None:
    """No rotation changes a square, so its metadata is not waited for."""
    data = saved(picture(size=(64, 64)), "PNG")
    assert probe_image(data[:41], len(data)) == ImageHeader("PNG", 64, 64)


def test_a_lying_chunk_length_is_bounded_by_the_file() -> None:
    data = png(after=struct.pack(">L", 0xFFFFFFF0) + b"abCd")
    assert probe_image(data) == ImageHeader("PNG", *SIZE)


PNG_CHUNKS = [
    chunk(b"eXIf", EXIF_WITHOUT),
    chunk(b"eXIf", b""),
    text_chunk(RAW_KEY, raw_profile(exif(6))),
    text_chunk(RAW_KEY, raw_profile(exif(1))),
    text_chunk(RAW_KEY, b"\nexif\n"),
    text_chunk(RAW_KEY + b" and more", b"x"),
    text_chunk(XMP_KEY, b""),
    text_chunk(XMP_KEY, PACKED_XMP % 6),
    chunk(b"tEXt", XMP_KEY),
    chunk(b"zTXt", XMP_KEY),
    chunk(b"iTXt", XMP_KEY),
    chunk(b"iTXt", XMP_KEY + b"\0\0\0\0"),
    packed_text_chunk(XMP_KEY, PACKED_XMP % 6),
    chunk(b"zTXt", XMP_KEY + b"\0\0" + zlib.compress(PACKED_XMP % 6)[:-6]),
    chunk(b"zTXt", XMP_KEY + b"\0\0damaged"),
    international_chunk(XMP_KEY, PACKED_XMP % 6),
    international_chunk(XMP_KEY, b"\xff" + PACKED_XMP % 5),
    international_chunk(XMP_KEY, PACKED_XMP % 1, packed=True),
    chunk(b"iTXt", XMP_KEY + b"\0\1\0\0\0damaged"),
    chunk(b"iTXt", XMP_KEY + b"\0\1\1\0\0unknown method"),
    text_chunk(b"default_image", b"yes"),
    text_chunk(b"Comment", b"hello"),
    ACTL,
    chunk(b"acTL", struct.pack(">LL", 1, 0)),
    chunk(b"acTL", struct.pack(">LL", 0, 0)),
    FCTL,
    NEXT_FCTL,
    chunk(b"abCd", b"private"),
    chunk(b"a_0Z", b"odd name"),
    chunk(b"a-0Z", b"no name"),
    chunk(b"IDAT", b""),
    IEND,
]
CHUNKS = st.lists(st.sampled_from(PNG_CHUNKS), max_size=5)


@examples(700)
@given(CHUNKS, CHUNKS, st.sampled_from([b"", chunk(b"eXIf", exif(6)), chunk(b"eXIf", exif(1))]), st.booleans())
def test_png_chunks(before: list[bytes], after: list[bytes], exif_chunk: bytes, early: bool) -> None:
    parts = [b"".join(before), b"".join(after)]
    parts[0 if early else 1] += exif_chunk
    data = png(*parts)
    assert_compatible(data)
    if not early:
        assert grow(data) == probe(data)
