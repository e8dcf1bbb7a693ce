"""The header probe over damaged, hostile and random files: it fails with its own errors alone."""

from __future__ import annotations

import io
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from preprocess_service.media.headers import SUPPORTED_FORMATS, HeaderError, TruncatedHeader, probe_image
from tests.preprocess_service.header_files import (
    IDAT,
    IEND,
    JFIF_DENSITY,
    PNG_MAGIC,
    RAW_KEY,
    SIZE,
    VP8L,
    animation,
    app1_exif,
    assert_compatible,
    chunk,
    directory,
    examples,
    exif,
    extended_webp,
    gif_with,
    grow,
    ihdr,
    jpeg,
    picture,
    png,
    probe,
    reference,
    riff_chunk,
    saved,
    segment,
    text_chunk,
    tiff_header,
)
from tests.preprocess_service.header_placements import PLACEMENTS

pytestmark = pytest.mark.usefixtures("small_pixel_limit")


def test_empty_file() -> None:
    with pytest.raises(HeaderError, match=r"^empty file \(0 bytes\)$"):
        probe_image(b"")


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"\0\0\0\x20ftypavif\0\0\0\0", "AVIF"),
        (b"\0\0\0\x20ftypheic\0\0\0\0", "HEIC"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"%PDF-1.7 and so on, and on", "PDF"),
        (b"hello world, this is text", r"hello wo"),
        (b"RIFF\4\0\0\0WAVEfmt ", "RIFF"),
        (b"x", "x"),
    ],
)
def test_unsupported_files_are_named_with_the_supported_formats(data: bytes, found: str) -> None:
    with pytest.raises(HeaderError, match=found) as caught:
        probe_image(data)
    assert not isinstance(caught.value, TruncatedHeader)
    assert all(name in str(caught.value) for name in SUPPORTED_FORMATS)


def test_prefix_longer_than_its_file() -> None:
    with pytest.raises(HeaderError, match="10 bytes given with a prefix of"):
        probe_image(png(), 10)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (jpeg()[:20], "truncated"),
        (jpeg()[: jpeg().index(b"\xff\xc0") + 5], "truncated"),
        (jpeg(before_scan=segment(0xE2, bytes(50))).split(b"\xff\xda")[0][:-10], "truncated"),
        (jpeg().split(b"\xff\xda")[0] + b"\xff\xda\0\x0c", "truncated"),
        (png()[:20], "truncated"),
        (png()[:36], "truncated"),
        (saved(picture(), "WEBP")[:-2], "truncated"),
        (saved(picture("P"), "GIF")[:30], "truncated"),
        (b"GIF89a" + struct.pack("<HHBBB", *SIZE, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, *SIZE, 0), "truncated"),
        (saved(picture(), "BMP")[:30], "truncated"),
        (saved(picture(), "TIFF")[:9], "truncated"),
        (PNG_MAGIC + IDAT + IEND, "no IHDR"),
        (png().replace(b"\0\0\0\3", b"\0\0\0\4", 1), "checksum"),
        (PNG_MAGIC + ihdr(0, 5) + IDAT + IEND, "no pixels"),
        (png(chunk(b"eXIf", b"nonsense")), "unreadable EXIF"),
        (png(text_chunk(RAW_KEY, b"\nexif\n 4\nxyz")), "not hexadecimal"),
        (jpeg(JFIF_DENSITY + app1_exif(b"nonsense")), "unreadable EXIF"),
        (jpeg().replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"), "12 bits"),
        (jpeg(b"\xff\x02"), "no marker"),
        (saved(picture("P"), "GIF")[:-1].split(b",")[0] + b";", "without an image"),
        (b"BM" + bytes(40), "header of 0 bytes"),
        (b"II*\0\0\0\0\0" + bytes(8), "without an image"),
        (tiff_header() + directory([(256, 3, 1, b"\3\0")]), "without a width and a height"),
        (tiff_header() + directory([(256, 11, 1, struct.pack("<f", 3)), (257, 3, 1, b"\2\0")]), "without a width"),
    ],
)
def test_broken_headers_say_what_is_wrong(data: bytes, message: str) -> None:
    with pytest.raises(HeaderError, match=message) as caught:
        probe_image(data)
    assert not isinstance(caught.value, TruncatedHeader)
    assert reference(data) is None


@pytest.mark.parametrize(
    "data",
    [
        jpeg(before_scan=app1_exif(exif(6))).split(b"\xff\xda")[0],
        png(chunk(b"eXIf", exif(6)))[:-20],
        png(chunk(b"eXIf", exif(6)), after=chunk(b"tEXt", bytes(50)))[:-40],
    ],
)
def test_a_file_cut_off_behind_its_size_keeps_what_was_found(data: bytes) -> None:
    assert Image.open(io.BytesIO(data)).size == SIZE
    assert probe_image(data).width == SIZE[1]


BOMB = zlib.compress(bytes(1 << 20))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\xff\xd8" + b"\xff\xd0" * 200_000, id="jpeg markers"),
        pytest.param(b"\xff\xd8\xff" + bytes(2_000_000), id="jpeg junk"),
        pytest.param(png(after=chunk(b"IDAT", b"") * 200_000), id="png chunks"),
        pytest.param(png(chunk(b"zTXt", RAW_KEY + b"\0\0" + BOMB) * 8), id="png texts that expand"),
        pytest.param(png(chunk(b"zTXt", RAW_KEY + b"\0\0" + BOMB[:-4] + b"oops") * 8), id="png damaged texts"),
        pytest.param(png(chunk(b"zTXt", RAW_KEY + b"\0\0" + zlib.compress(bytes(2 << 20)))), id="png large text"),
        pytest.param(png(text_chunk(RAW_KEY, b"\n" * (5 << 20))), id="png raw profile"),
        pytest.param(gif_with(b"!\xf9" + b"\1x" * 200_000 + b"\0"), id="gif blocks"),
        pytest.param(gif_with(bytes(2_000_000)), id="gif junk"),
        pytest.param(extended_webp(0x08, VP8L, riff_chunk(b"abcd", b"") * 200_000), id="webp chunks"),
        pytest.param(b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 1 << 40) + bytes(20 * 200_000), id="tiff tags"),
    ],
)
def test_hostile_files_are_refused(data: bytes) -> None:
    with pytest.raises(HeaderError) as caught:
        probe_image(data)
    assert not isinstance(caught.value, TruncatedHeader)


CORPUS = [
    *(PLACEMENTS[name](6) for name in PLACEMENTS if not name.startswith("png last")),
    *(saved(picture(mode), "BMP") for mode in ("1", "P", "RGB")),
    *(animation(image_format) for image_format in ("GIF", "PNG", "WEBP")),
]
EDITS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=3)), max_size=4)


@examples(1200)
@given(st.sampled_from(range(len(CORPUS))), EDITS, st.floats(0, 1), st.booleans())
def test_mutations_of_valid_files(index: int, edits: list[tuple[float, bytes]], end: float, cut: bool) -> None:
    data = bytearray(CORPUS[index])
    header = min(len(data), 400)  # where an edit matters most
    for position, patch in edits:
        start = int(position * header)
        data[start : start + len(patch)] = patch
    mutated = bytes(data[: int(end * len(data))] if cut else data)
    assert_compatible(mutated)
    assert grow(mutated) == probe(mutated)


@examples(1000)
@given(
    st.sampled_from(
        [b"", b"\xff\xd8\xff", PNG_MAGIC, PNG_MAGIC + ihdr(), b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"II+\0"]
    ),
    st.binary(max_size=200),
    st.integers(0, 300),
)
def test_random_bytes(magic: bytes, body: bytes, num_missing: int) -> None:
    data = magic + body
    assert_compatible(data)
    assert grow(data) == probe(data)
    probe(data, len(data) + num_missing)
