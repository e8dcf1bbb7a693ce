"""WebP headers against the reference."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.preprocess_service.header_files import (
    EXIF_WITHOUT,
    PACKED_XMP,
    VP8L,
    assert_compatible,
    examples,
    exif,
    extended_webp,
    grow,
    probe,
    riff_chunk,
)

pytestmark = pytest.mark.usefixtures("small_pixel_limit")


WEBP_CHUNKS = [
    VP8L,
    riff_chunk(b"EXIF", exif(6)),
    riff_chunk(b"EXIF", EXIF_WITHOUT),
    riff_chunk(b"EXIF", b""),
    riff_chunk(b"EXIF", b"nonsense"),
    riff_chunk(b"XMP ", PACKED_XMP % 6),
    riff_chunk(b"XMP ", PACKED_XMP % 1),
    riff_chunk(b"XMP ", b""),
    riff_chunk(b"ICCP", b"profile"),
    riff_chunk(b"abcd", b"odd"),
]


@examples(500)
@given(
    st.integers(0, 15).map(lambda bits: bits << 2), st.lists(st.sampled_from(WEBP_CHUNKS), max_size=5), st.booleans()
)
def test_webp_chunks(flags: int, chunks: list[bytes], trailing: bool) -> None:
    data = extended_webp(flags, *chunks, *([] if VP8L in chunks else [VP8L])) + b"trailing" * trailing
    assert_compatible(data)
    assert grow(data) == probe(data)
