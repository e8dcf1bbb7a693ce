"""Decoding equals transformers' `load_image`, and never decodes what the header did not promise."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageFile
from transformers.image_utils import load_image

from diptych.service.errors import InvalidInputError
from preprocess_service.media.decode import decode_image, use_our_limits
from preprocess_service.media.headers import HeaderError, probe_image
from preprocess_service.requests import PlannedItem
from registry import ItemLayout, MediaInfo, PlaceholderRange, Run
from tests.tiny_checkpoint import encoded, picture

MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK")


@pytest.fixture(autouse=True, scope="module")
def limits() -> None:
    use_our_limits()


def planned(data: bytes, height: int | None = None, width: int | None = None) -> PlannedItem:
    header = probe_image(data)
    info = MediaInfo.image(height or header.height, width or header.width)
    return PlannedItem(info, ItemLayout((Run(0, 1),), {}), PlaceholderRange(0, 1), header.format, None, data)


def in_mode(mode: str) -> Image.Image:
    if mode == "I;16":
        values = np.random.default_rng(1).integers(0, 65536, (21, 34), dtype=np.uint16)
        return Image.fromarray(values)
    image = picture(21, 34).convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


@pytest.mark.parametrize("mode", MODES)
def test_every_mode(mode: str) -> None:
    data = encoded(in_mode(mode), "TIFF" if mode == "CMYK" else "PNG")
    expected = load_image(Image.open(BytesIO(data)))
    decoded = decode_image(planned(data), 0)
    assert decoded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(expected))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation(image_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(10, 30), image_format, exif=exif)
    item = planned(data)
    assert item.info.size == ((30, 10) if orientation >= 5 else (10, 30))
    expected = load_image(Image.open(BytesIO(data)))
    np.testing.assert_array_equal(np.asarray(decode_image(item, 0)), np.asarray(expected))


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG"])
def test_animations_give_their_first_frame(image_format: str) -> None:
    frames = [picture(12, 16, seed).convert("P").convert("RGB") for seed in range(3)]
    data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:])
    expected = load_image(Image.open(BytesIO(data)))
    np.testing.assert_array_equal(np.asarray(decode_image(planned(data), 0)), np.asarray(expected))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"])
def test_cut_off_files(image_format: str) -> None:
    data = encoded(picture(60, 80), image_format)
    item = planned(data)
    cut = PlannedItem(item.info, item.layout, item.placeholder, item.file_format, None, data[: len(data) // 2])
    with pytest.raises(InvalidInputError, match=f"item 3: the {image_format} image cannot be decoded") as caught:
        decode_image(cut, 3)
    assert (caught.value.stage, caught.value.item) == ("decode", 3)


def test_another_size_than_promised_is_not_decoded() -> None:
    with pytest.raises(InvalidInputError, match="its header says"):
        decode_image(planned(encoded(picture(10, 20)), 10, 21), 0)


def test_no_pixel_of_another_size_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose header the walk and Pillow read differently may be of any size: it is refused before its pixels."""
    loaded, load = [], ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: loaded.append(self.size) or load(self))
    decode_image(planned(encoded(picture(10, 20))), 0)
    assert set(loaded) == {(20, 10)}
    loaded.clear()
    with pytest.raises(InvalidInputError, match="its header says"):
        decode_image(planned(encoded(picture(10, 20)), 10, 21), 0)
    assert not loaded


def test_sides_swapped_are_not_the_same_size() -> None:
    with pytest.raises(InvalidInputError, match="decodes to 20x10 pixels, its header says 10x20"):
        decode_image(planned(encoded(picture(10, 20)), 20, 10), 0)


@pytest.mark.parametrize("other", ["GIF", "JPEG", "PPM", "ICO", "JPEG2000"])
def test_only_the_format_of_the_header_is_decoded(other: str) -> None:
    """Pillow could read it all the same, by a parser that nobody has asked for."""
    item, data = planned(encoded(picture(16, 16))), encoded(picture(16, 16), other)
    assert Image.open(BytesIO(data)).size == (16, 16)
    disguised = PlannedItem(item.info, item.layout, item.placeholder, item.file_format, None, data)
    expected = "item 3: the PNG image cannot be decoded: its data is not what its header says"
    with pytest.raises(InvalidInputError, match=expected) as caught:
        decode_image(disguised, 3)
    assert (caught.value.stage, caught.value.item) == ("decode", 3)


@pytest.mark.parametrize("other", ["PPM", "TGA", "ICO", "JPEG2000"])
def test_what_pillow_reads_beyond_the_supported_formats(other: str) -> None:
    data = encoded(picture(16, 16), other)
    assert Image.open(BytesIO(data)).size == (16, 16)
    named = {"ICO": "found ICO", "JPEG2000": "found JPEG 2000"}.get(other, "found ")
    with pytest.raises(HeaderError, match=f"not a supported image: {named}.*; supported formats: .*PNG"):
        probe_image(data)
