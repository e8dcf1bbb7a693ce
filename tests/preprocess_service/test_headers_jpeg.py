"""JPEG headers against the reference."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from preprocess_service.media.headers import ImageHeader, TruncatedHeader, probe_image
from tests.preprocess_service.header_files import (
    COMMENT,
    EXIF_WITHOUT,
    JFIF_DENSITY,
    PACKED_XMP,
    app1_exif,
    app1_xmp,
    assert_compatible,
    examples,
    exif,
    grow,
    jpeg,
    picture,
    probe,
    saved,
    segment,
)

pytestmark = pytest.mark.usefixtures("small_pixel_limit")


TINY_JPEG_FRAME = segment(0xC0, b"\x08\0\1\0\2\1\1\1\1")


def test_many_exif_segments_are_joined_in_linear_time() -> None:
    parts = app1_exif(exif(6)) + app1_exif(bytes(65_000)) * 300
    assert probe_image(b"\xff\xd8" + parts + TINY_JPEG_FRAME) == ImageHeader("JPEG", 1, 2)


def test_large_segments_are_skipped_not_asked_for() -> None:
    data = jpeg(segment(0xE2, b"ICC_PROFILE\0" + bytes(60_000)))
    with pytest.raises(TruncatedHeader) as caught:
        probe_image(data[:1000], len(data))
    end = 2 + 4 + 60_012
    assert caught.value.bytes_needed == end + 4


JPEG_SEGMENTS = [
    app1_exif(exif(6)),
    app1_exif(exif(1)),
    app1_exif(EXIF_WITHOUT),
    app1_exif(b""),
    app1_exif(b"nonsense"),
    app1_xmp(PACKED_XMP % 6),
    app1_xmp(PACKED_XMP % 1),
    app1_xmp(b""),
    JFIF_DENSITY,
    segment(0xE0, b"JFIF\0\1\1\0\0\x48\0\x48\0\0"),
    COMMENT,
    segment(0xDD, b"\0\0"),
    segment(0xDE, b"\x08\0\7\0\5\1\1\1\1"),
    b"\xff\x02",
    b"\xff\xe5\0\0",
    b"\xff\xe5\0\1",
    b"\xff\xff\xff",
    b"\xff\0",
    b"\xff\xd9",
    b"\xff\xf5",
    b"junk",
]
BARE_JPEG = saved(picture(), "JPEG")


@examples(500)
@given(st.lists(st.sampled_from(JPEG_SEGMENTS), max_size=6), st.lists(st.sampled_from(JPEG_SEGMENTS), max_size=3))
def test_jpeg_segments(first: list[bytes], before_scan: list[bytes]) -> None:
    data = jpeg(b"".join(first), b"".join(before_scan), BARE_JPEG)
    assert_compatible(data)
    assert grow(data) == probe(data)
    # Most odd segments keep libjpeg from decoding, but not Pillow from opening.
    assert probe(data) == opened(data)


def opened(data: bytes) -> ImageHeader | None:
    """The answer of Pillow without decoding, for formats whose EXIF it reads on opening."""
    try:
        image = Image.open(io.BytesIO(data))
        turned = image.getexif().get(274, 1) in range(5, 9)
    except (SyntaxError, OSError):
        return None
    return ImageHeader("JPEG", *(image.size[::-1] if turned else image.size))
