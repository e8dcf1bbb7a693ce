"""The header probe against the reference: Pillow's open and EXIF rotation, over honest files of every format."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
from PIL import Image

from preprocess_service.media.headers import ImageHeader, TruncatedHeader, probe_image
from tests.preprocess_service.header_files import (
    ORIENTATIONS,
    PNG_MAGIC,
    SIZE,
    VP8L,
    animation,
    app1_exif,
    assert_same,
    chunk,
    exif,
    extended_webp,
    grow,
    jpeg,
    picture,
    png,
    reference,
    saved,
)
from tests.preprocess_service.header_placements import PLACEMENTS

pytestmark = pytest.mark.usefixtures("small_pixel_limit")


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement_of_an_orientation(placement: str) -> None:
    for orientation in ORIENTATIONS:
        assert_same(PLACEMENTS[placement](orientation))


def test_the_matrix_covers_rotated_and_unrotated_results() -> None:
    turned = {name for name, build in PLACEMENTS.items() if probe_image(build(6)).width == SIZE[1]}
    assert {"jpeg", "png after", "webp", "tiff xmp", "mpo", "apng"} <= turned
    assert {"gif xmp", "webp exif not announced", "apng exif behind the first frame"}.isdisjoint(turned)


VARIANTS = [
    *(("JPEG", mode, options) for mode in ("L", "RGB", "CMYK") for options in ({}, {"progressive": True})),
    *(("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    *(("GIF", mode, {}) for mode in ("1", "L", "P", "RGB")),
    *(("WEBP", mode, options) for mode in ("L", "RGB", "RGBA") for options in ({}, {"lossless": True})),
    *(("BMP", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")),
    *(("TIFF", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F")),
    *(("TIFF", "RGB", {"compression": name}) for name in ("tiff_lzw", "jpeg", "packbits", "tiff_adobe_deflate")),
    ("TIFF", "RGB", {"big_tiff": True}),
]


@pytest.mark.parametrize(("image_format", "mode", "options"), VARIANTS)
def test_formats_and_modes(image_format: str, mode: str, options: dict[str, Any]) -> None:
    for size in ((1, 1), (1, 7), (40, 17), (300, 200)):
        image = picture("L", size).convert("I").convert(mode) if mode == "I;16" else picture(mode, size)
        data = saved(image, image_format, **options)
        assert probe_image(data) == reference(data) == ImageHeader(image_format, *size)
        assert grow(data) == probe_image(memoryview(data))


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "MPO", "TIFF"])
def test_animations(image_format: str) -> None:
    assert_same(animation(image_format))


def test_agrees_with_load_image_of_transformers() -> None:
    image_utils = pytest.importorskip("transformers.image_utils")
    for build in (PLACEMENTS["jpeg"], PLACEMENTS["png after"], PLACEMENTS["webp xmp"], PLACEMENTS["tiff"]):
        header = probe_image(build(6))
        assert image_utils.load_image(Image.open(io.BytesIO(build(6)))).size == (header.width, header.height) == (2, 3)


def test_header_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        probe_image(png()).width = 1  # type: ignore[misc]


@pytest.mark.parametrize("placement", ["jpeg", "png before", "png after", "webp", "apng", "tiff", "gif xmp"])
def test_pixel_data_is_never_looked_at(placement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build = PLACEMENTS[placement]
    expected = probe_image(build(6))
    monkeypatch.setattr(Image, "open", None)
    for pixels in pixel_ranges(build(6)):
        garbage = bytearray(build(6))
        garbage[pixels] = b"\xa5" * (pixels.stop - pixels.start)
        assert probe_image(bytes(garbage)) == expected


def pixel_ranges(data: bytes) -> list[slice]:
    if data.startswith(b"\xff\xd8"):
        return [slice(data.index(b"\xff\xda") + 14, len(data))]
    if data.startswith(PNG_MAGIC):
        start = data.index(b"IDAT")
        return [slice(start + 4, start + 8 + int.from_bytes(data[start - 4 : start], "big"))]
    if data.startswith(b"RIFF"):
        start = data.index(b"VP8 ") if b"VP8 " in data else data.index(b"VP8L")
        return [slice(start + 8, start + 8 + int.from_bytes(data[start + 4 : start + 8], "little"))]
    if data.startswith(b"II"):
        return [slice(len(data) - 3 * SIZE[0] * SIZE[1], len(data))]
    return [slice(len(data) - 6, len(data))]


@pytest.mark.parametrize(
    ("data", "num_bytes"),
    [
        pytest.param(
            jpeg(app1_exif(exif(6))), jpeg(app1_exif(exif(6))).index(b"\xff\xda") + 4, id="jpeg: start of scan"
        ),
        pytest.param(png(chunk(b"eXIf", exif(1))), 8 + 25 + 12 + len(exif(1)) + 8, id="png with exif: pixels"),
        pytest.param(png(), len(png()) - 4, id="png without: end"),
        pytest.param(saved(picture(), "WEBP"), 30, id="webp: first chunk"),
        pytest.param(extended_webp(0, VP8L), 30, id="webp without flags: first chunk"),
        pytest.param(PLACEMENTS["webp"](6), len(PLACEMENTS["webp"](6)), id="webp with exif: end"),
        pytest.param(saved(picture(), "BMP"), 34, id="bmp: header"),
    ],
)
def test_what_settles_a_prefix(data: bytes, num_bytes: int) -> None:
    assert probe_image(data[:num_bytes], len(data)) == probe_image(data)
    with pytest.raises(TruncatedHeader) as caught:
        probe_image(data[: num_bytes - 1], len(data))
    assert caught.value.bytes_needed == num_bytes
    assert f"{num_bytes - 1} of {len(data)} bytes" in str(caught.value)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_prefix_grows_to_the_same_answer(placement: str) -> None:
    data = PLACEMENTS[placement](6)
    expected = probe_image(data)
    assert all(grow(data, num_bytes) == expected for num_bytes in range(0, len(data) + 1, 7))
