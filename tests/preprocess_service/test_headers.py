"""The header probe against the reference: Pillow's open and EXIF rotation, over honest, odd and damaged files."""

import dataclasses
import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from preprocess_service.media import header_exif
from preprocess_service.media.headers import SUPPORTED_FORMATS, HeaderError, ImageHeader, TruncatedHeader, probe_image


def examples(count: int) -> settings:
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


ORIENTATIONS = range(10)  # 0 and 9 are none


@pytest.fixture(autouse=True, scope="module")
def _small_pixel_limit() -> Iterator[None]:
    """Mutations may ask for gigapixels; let the reference refuse those instead of allocating them."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 1 << 20
    yield
    Image.MAX_IMAGE_PIXELS = limit


def reference(data: bytes) -> ImageHeader | None:
    """What the reference loads, None if it does not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data))
            loaded = ImageOps.exif_transpose(image).convert("RGB")
        except Exception:
            return None
    image_format = "JPEG" if image.format == "MPO" else str(image.format)
    return ImageHeader(image_format, *loaded.size)


def probe(data: bytes, total_bytes: int | None = None) -> ImageHeader | None:
    try:
        return probe_image(data, total_bytes)
    except HeaderError:
        return None


def grow(data: bytes, num_bytes: int = 0) -> ImageHeader | None:
    """Probe ever longer prefixes, each as long as the previous one asked for."""
    while (needed := bytes_needed(data, num_bytes)) is not None:
        assert num_bytes < needed <= len(data)
        num_bytes = needed
    return probe(data[:num_bytes], len(data))


def bytes_needed(data: bytes, num_bytes: int) -> int | None:
    try:
        probe_image(data[:num_bytes], len(data))
    except TruncatedHeader as error:
        return error.bytes_needed
    except HeaderError:
        pass
    return None


def assert_same(data: bytes) -> None:
    """The reference loads this file, and the probe agrees: at once and by growing prefixes."""
    expected = reference(data)
    assert expected is not None
    assert probe_image(data) == expected
    assert grow(data) == expected


def assert_compatible(data: bytes) -> None:
    """If the reference loads this file, the probe agrees; in any case it fails with its own errors alone."""
    expected, found = reference(data), probe(data)
    if expected is not None and expected.format in SUPPORTED_FORMATS:
        assert found == expected


# ---------------------------------------------------------------------------------------------------- building files

SIZE = (3, 2)
PACKED_XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'
ELEMENT_XMP = b"<x:xmpmeta><tiff:Orientation>%d</tiff:Orientation></x:xmpmeta>"


def picture(mode: str = "RGB", size: tuple[int, int] = SIZE) -> Image.Image:
    return Image.linear_gradient("L").resize(size).convert("RGB").convert(mode)


def saved(image: Image.Image, image_format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, image_format, **options)
    return out.getvalue()


Entry = tuple[int, int, int, bytes]  # tag, type, count, inline value


def directory(entries: list[Entry], order: str = "<") -> bytes:
    packed = (struct.pack(order + "HHL", *entry[:3]) + entry[3].ljust(4, b"\0")[:4] for entry in entries)
    return struct.pack(order + "H", len(entries)) + b"".join(packed) + struct.pack(order + "L", 0)


def tiff_header(order: str = "<", offset: int = 8) -> bytes:
    return (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "L", offset)


def exif(orientation: int, order: str = "<") -> bytes:
    model = (272, 2, 4, b"one\0")
    return tiff_header(order) + directory([model, (274, 3, 1, struct.pack(order + "H", orientation))], order)


EXIF_WITHOUT = tiff_header() + directory([(272, 2, 4, b"one\0")])


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def app1_exif(payload: bytes) -> bytes:
    return segment(0xE1, b"Exif\0\0" + payload)


def app1_xmp(packet: bytes) -> bytes:
    return segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + packet)


COMMENT = segment(0xFE, b"a comment")
JFIF_DENSITY = segment(0xE0, b"JFIF\0\1\1\1\0\x48\0\x48\0\0")


def jpeg(first: bytes = b"", before_scan: bytes = b"", base: bytes | None = None) -> bytes:
    """A JPEG with segments inserted at its start and just before its scan."""
    base = base or saved(picture(), "JPEG")
    scan = base.index(b"\xff\xda")
    return base[:2] + first + base[2:scan] + before_scan + base[scan:]


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">L", len(body)) + name + body + struct.pack(">L", zlib.crc32(name + body))


def ihdr(width: int = SIZE[0], height: int = SIZE[1]) -> bytes:
    return chunk(b"IHDR", struct.pack(">LLBBBBB", width, height, 8, 2, 0, 0, 0))


PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
IDAT = chunk(b"IDAT", zlib.compress(bytes(SIZE[1] * (1 + 3 * SIZE[0]))))
IEND = chunk(b"IEND", b"")


def png(before: bytes = b"", after: bytes = b"") -> bytes:
    return PNG_MAGIC + ihdr() + before + IDAT + after + IEND


def raw_profile(payload: bytes) -> bytes:
    payload = b"Exif\0\0" + payload
    text = payload.hex()
    lines = "\n".join(text[i : i + 72] for i in range(0, len(text), 72))
    return f"\nexif\n{len(payload):8}\n{lines}\n".encode()


def text_chunk(key: bytes, value: bytes) -> bytes:
    return chunk(b"tEXt", key + b"\0" + value)


def packed_text_chunk(key: bytes, value: bytes) -> bytes:
    return chunk(b"zTXt", key + b"\0\0" + zlib.compress(value))


def international_chunk(key: bytes, value: bytes, packed: bool = False, language: bytes = b"") -> bytes:
    value = zlib.compress(value) if packed else value
    return chunk(b"iTXt", key + bytes([0, packed, 0]) + language + b"\0\0" + value)


RAW_KEY, XMP_KEY = b"Raw profile type exif", b"XML:com.adobe.xmp"


def actl(num_frames: int) -> bytes:
    return chunk(b"acTL", struct.pack(">LL", num_frames, 0))


ACTL = actl(2)
FCTL, NEXT_FCTL = (chunk(b"fcTL", struct.pack(">LLLLLHHBB", number, *SIZE, 0, 0, 1, 1, 0, 0)) for number in (0, 1))


def riff_chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<L", len(body)) + body + b"\0" * (len(body) % 2)


VP8L = saved(picture(), "WEBP", lossless=True)[12:]


def extended_webp(flags: int, *chunks: bytes) -> bytes:
    canvas = (SIZE[0] - 1).to_bytes(3, "little") + (SIZE[1] - 1).to_bytes(3, "little")
    body = b"WEBP" + riff_chunk(b"VP8X", bytes([flags, 0, 0, 0]) + canvas) + b"".join(chunks)
    return b"RIFF" + struct.pack("<L", len(body)) + body


def animation(image_format: str, **options: Any) -> bytes:
    frames = [picture(), ImageOps.invert(picture()), ImageOps.flip(picture())]
    return saved(frames[0], image_format, save_all=True, append_images=frames[1:], duration=20, **options)


def compressed_tiff(orientation: int) -> bytes:
    data = saved(picture(), "TIFF", tiffinfo={274: 6}, compression="tiff_adobe_deflate")
    entry = struct.pack("<HHL", 274, 3, 1)  # patched, because libtiff writes no invalid orientation
    return data.replace(entry + b"\6", entry + bytes([orientation]))


# Every way in which an orientation gets into a file.
PLACEMENTS: dict[str, Callable[[int], bytes]] = {
    "jpeg": lambda o: jpeg(app1_exif(exif(o))),
    "jpeg big-endian": lambda o: jpeg(app1_exif(exif(o, ">"))),
    "jpeg after the frame header": lambda o: jpeg(before_scan=app1_exif(exif(o))),
    "jpeg exif in two segments": lambda o: jpeg(app1_exif(exif(o)[:20]) + app1_exif(exif(o)[20:])),
    "jpeg exif header twice": lambda o: jpeg(app1_exif(b"Exif\0\0" + exif(o))),
    "jpeg xmp": lambda o: jpeg(app1_xmp(PACKED_XMP % o)),
    "jpeg xmp element": lambda o: jpeg(app1_xmp(ELEMENT_XMP % o)),
    "jpeg last xmp wins": lambda o: jpeg(app1_xmp(PACKED_XMP % 6) + app1_xmp(PACKED_XMP % o)),
    "jpeg xmp beside exif without orientation": lambda o: jpeg(app1_exif(EXIF_WITHOUT) + app1_xmp(PACKED_XMP % o)),
    "jpeg exif before xmp": lambda o: jpeg(app1_xmp(PACKED_XMP % 6) + app1_exif(exif(o))),
    "jpeg fill and junk bytes": lambda o: jpeg(COMMENT + b"junk\xff\0\xff" + app1_exif(exif(o)) + b"\xff\xd0"),
    "jpeg unreadable exif hides xmp": lambda o: jpeg(app1_exif(b"nonsense") + app1_xmp(PACKED_XMP % o)),
    "jpeg empty exif": lambda o: jpeg(app1_exif(b"") + app1_xmp(PACKED_XMP % o)),
    "jpeg progressive": lambda o: saved(picture(), "JPEG", progressive=True, exif=b"Exif\0\0" + exif(o)),
    "jpeg cmyk": lambda o: saved(picture("CMYK"), "JPEG", exif=b"Exif\0\0" + exif(o)),
    "mpo": lambda o: animation("MPO", exif=b"Exif\0\0" + exif(o)),
    "png before": lambda o: png(before=chunk(b"eXIf", exif(o))),
    "png after": lambda o: png(after=chunk(b"eXIf", exif(o))),
    "png last exif wins": lambda o: png(before=chunk(b"eXIf", exif(o)) + chunk(b"eXIf", exif(9 - o))),
    "png with exif header": lambda o: png(before=chunk(b"eXIf", b"Exif\0\0" + exif(o))),
    "png raw profile": lambda o: png(before=text_chunk(RAW_KEY, raw_profile(exif(o)))),
    "png packed raw profile": lambda o: png(before=packed_text_chunk(RAW_KEY, raw_profile(exif(o)))),
    "png packed raw profile after": lambda o: png(after=packed_text_chunk(RAW_KEY, raw_profile(exif(o)))),
    "png international raw profile": lambda o: png(before=international_chunk(RAW_KEY, raw_profile(exif(o)))),
    "png exif before raw profile": lambda o: png(text_chunk(RAW_KEY, raw_profile(exif(6))), chunk(b"eXIf", exif(o))),
    "png exif as text": lambda o: png(before=text_chunk(b"exif", exif(o))),
    "png xmp": lambda o: png(before=international_chunk(XMP_KEY, PACKED_XMP % o)),
    "png xmp after": lambda o: png(after=international_chunk(XMP_KEY, ELEMENT_XMP % o)),
    "png packed xmp": lambda o: png(before=international_chunk(XMP_KEY, PACKED_XMP % o, packed=True)),
    "png xmp in plain text": lambda o: png(before=text_chunk(XMP_KEY, PACKED_XMP % o)),
    "png xmp not utf-8": lambda o: png(before=international_chunk(XMP_KEY, b"\xff" + PACKED_XMP % o)),
    "png xmp with bad language": lambda o: png(before=international_chunk(XMP_KEY, PACKED_XMP % o, language=b"\xff")),
    "png utf-8 xmp wins": lambda o: png(
        international_chunk(XMP_KEY, PACKED_XMP % o), international_chunk(XMP_KEY, b"\xff" + PACKED_XMP % 6)
    ),
    "png xmp beside exif without orientation": lambda o: png(
        chunk(b"eXIf", EXIF_WITHOUT), international_chunk(XMP_KEY, PACKED_XMP % o)
    ),
    "png damaged packed text": lambda o: png(chunk(b"zTXt", RAW_KEY + b"\0\0junk") + chunk(b"eXIf", exif(o))),
    "png behind a broken chunk": lambda o: png(after=chunk(b"a b ", b"") + chunk(b"eXIf", exif(o))),
    "png behind its end": lambda o: png() + chunk(b"eXIf", exif(o)),
    "apng": lambda o: animation("PNG", exif=b"Exif\0\0" + exif(o)),
    "apng exif behind the first frame": lambda o: png(ACTL + FCTL, NEXT_FCTL + chunk(b"eXIf", exif(o))),
    "apng exif behind the default image": lambda o: png(ACTL, FCTL + chunk(b"eXIf", exif(o))),
    "apng of one frame": lambda o: png(actl(1) + FCTL, NEXT_FCTL + chunk(b"eXIf", exif(o))),
    "apng of one frame, with a text that Pillow takes for its flag": lambda o: png(
        actl(1) + text_chunk(b"default_image", b"yes") + FCTL, NEXT_FCTL + chunk(b"eXIf", exif(o))
    ),
    "apng of no frames": lambda o: png(actl(0), FCTL + chunk(b"eXIf", exif(o))),
    "apng that says twice that it is one": lambda o: png(ACTL * 2, FCTL + chunk(b"eXIf", exif(o))),
    "png empty exif hides raw profile": lambda o: png(
        text_chunk(b"exif", b"") + text_chunk(RAW_KEY, raw_profile(exif(6))) + text_chunk(XMP_KEY, PACKED_XMP % o)
    ),
    "png raw profile in odd lines": lambda o: png(
        text_chunk(RAW_KEY, b"\nexif\n 38\n" + b"\n".join(bytes([c]) for c in exif(o).hex().encode()))
    ),
    "png exif behind a stray fcTL": lambda o: png(after=FCTL + chunk(b"eXIf", exif(o))),
    "webp": lambda o: saved(picture(), "WEBP", exif=exif(o)),
    "webp lossless": lambda o: saved(picture(), "WEBP", lossless=True, exif=exif(o)),
    "webp with exif header": lambda o: extended_webp(0x08, VP8L, riff_chunk(b"EXIF", b"Exif\0\0" + exif(o))),
    "webp xmp": lambda o: saved(picture(), "WEBP", xmp=PACKED_XMP % o),
    "webp exif and xmp": lambda o: saved(picture(), "WEBP", exif=exif(o), xmp=PACKED_XMP % 6),
    "webp xmp beside exif without": lambda o: saved(picture(), "WEBP", exif=EXIF_WITHOUT, xmp=PACKED_XMP % o),
    "webp exif not announced": lambda o: extended_webp(0, VP8L, riff_chunk(b"EXIF", exif(o))),
    "webp exif announced but absent": lambda o: extended_webp(0x0C, VP8L, riff_chunk(b"XMP ", PACKED_XMP % o)),
    "webp first exif wins": lambda o: extended_webp(
        0x08, VP8L, riff_chunk(b"EXIF", exif(o)), riff_chunk(b"EXIF", exif(9 - o))
    ),
    "webp exif before the pixels": lambda o: extended_webp(0x08, riff_chunk(b"EXIF", exif(o)), VP8L),
    "webp exif behind the container": lambda o: extended_webp(0x08, VP8L) + riff_chunk(b"EXIF", exif(o)),
    "webp animated": lambda o: animation("WEBP", exif=exif(o)),
    "gif xmp": lambda o: saved(picture("P"), "GIF").replace(
        b"\0,", b"\0!\xff\x0bXMP DataXMP" + PACKED_XMP % o + bytes(range(255, 0, -1)) + b"\0\0,", 1
    ),
    "tiff": lambda o: saved(picture(), "TIFF", tiffinfo={274: o}),
    "tiff compressed": compressed_tiff,
    "tiff xmp": lambda o: saved(picture(), "TIFF", tiffinfo={700: PACKED_XMP % o}),
    "tiff orientation hides xmp": lambda o: saved(picture(), "TIFF", tiffinfo={274: o, 700: PACKED_XMP % 6}),
    "tiff multi-page": lambda o: animation("TIFF", tiffinfo={274: o}),
    "bigtiff": lambda o: saved(picture(), "TIFF", tiffinfo={274: o}, big_tiff=True),
}


# ------------------------------------------------------------------------------------------------------ honest files


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


def test_top_down_bmp() -> None:
    data = bytearray(saved(picture(), "BMP"))
    data[22:26] = struct.pack("<l", -SIZE[1])
    assert_same(bytes(data))


def test_os2_bmp() -> None:
    pixels = bytes(SIZE[1] * 12)
    core = struct.pack("<LHHHH", 12, *SIZE, 1, 24)
    assert_same(b"BM" + struct.pack("<LLL", 26 + len(pixels), 0, 26) + core + pixels)


def test_gif_frame_larger_than_its_screen() -> None:
    data = bytearray(saved(picture("P"), "GIF"))
    data[6:10] = struct.pack("<HH", 1, 1)
    assert_same(bytes(data))


# Looks like an image descriptor to a walk that stands elsewhere than Pillow's.
DECOY = b"\x0a,\0\0\0\0\xff\0\xff\0\0"
GIF_EXTENSIONS = [
    b"!\xfe\0",
    b"!\xfe\3abc\2de\0",
    b"!\x01\0" + DECOY + b"\0",  # an empty extension: Pillow reads one more chain of blocks
    b"!\xff\x0bNETSCAPE2.0\3\1\0\0\0",
    b"!\xff\x0bNETSCAPE2.0\0" + DECOY + b"\0",
    b"!\xff\x0bNETSCAPE2.1\0",
    b"!\xf9\0" + DECOY + b"\0",
    b"!\xf9\4\0\0\0\0\0",
    b"junk",
]


def gif_with(extensions: bytes) -> bytes:
    data = saved(picture("P"), "GIF")
    frame = data.index(b",", 13 + (3 << (data[10] & 7) + 1))
    return data[:frame] + extensions + data[frame:]


@pytest.mark.parametrize("extension", GIF_EXTENSIONS)
def test_gif_extensions(extension: bytes) -> None:
    assert_same(gif_with(extension))


def test_the_file_extension_of_a_square_image_does_not_matter() -> None:
    """No rotation changes a square, so its metadata is not waited for."""
    data = saved(picture(size=(64, 64)), "PNG")
    assert probe_image(data[:41], len(data)) == ImageHeader("PNG", 64, 64)


def test_header_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        probe_image(png()).width = 1  # type: ignore[misc]


# ---------------------------------------------------------------------------------------------- never decodes, prefixes


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


def test_large_segments_are_skipped_not_asked_for() -> None:
    data = jpeg(segment(0xE2, b"ICC_PROFILE\0" + bytes(60_000)))
    with pytest.raises(TruncatedHeader) as caught:
        probe_image(data[:1000], len(data))
    end = 2 + 4 + 60_012
    assert caught.value.bytes_needed == end + 4


# ------------------------------------------------------------------------------------------------------------- errors


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


def test_a_lying_chunk_length_is_bounded_by_the_file() -> None:
    data = png(after=struct.pack(">L", 0xFFFFFFF0) + b"abCd")
    assert probe_image(data) == ImageHeader("PNG", *SIZE)


BOMB = zlib.compress(bytes(1 << 20))
TINY_JPEG_FRAME = segment(0xC0, b"\x08\0\1\0\2\1\1\1\1")


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


def test_many_exif_segments_are_joined_in_linear_time() -> None:
    parts = app1_exif(exif(6)) + app1_exif(bytes(65_000)) * 300
    assert probe_image(b"\xff\xd8" + parts + TINY_JPEG_FRAME) == ImageHeader("JPEG", 1, 2)


# --------------------------------------------------------------------------------------------------------- properties


def pillow_orientation(payload: bytes) -> int | None:
    """As `exif_transpose` sees it: 1 for any value that rotates nothing, None for a payload that it refuses."""
    exif_reader = Image.Exif()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exif_reader.load(payload)
        except Exception:
            return None
        value = exif_reader.get(274, 1)
    return next((orientation for orientation in range(2, 9) if orientation == value), 1)


def with_tail(entries: list[Entry], tail: bytes = b"") -> bytes:
    """A payload with values behind its directory, found where `tail_offset` says."""
    return tiff_header() + directory(entries) + tail


def tail_offset(num_entries: int = 1) -> bytes:
    return struct.pack("<L", 8 + 2 + 12 * num_entries + 4)


TURN, LEAVE = struct.pack("<H", 6), struct.pack("<H", 1)
SIX = struct.pack("<LL", 6, 1)
LARGE = struct.pack("<L", 8)
EXIF_CASES: dict[str, tuple[int, bytes]] = {
    "float": (6, with_tail([(274, 11, 1, struct.pack("<f", 6.0))])),
    "fractional float": (1, with_tail([(274, 11, 1, struct.pack("<f", 6.5))])),
    "double": (6, with_tail([(274, 12, 1, tail_offset())], struct.pack("<d", 6.0))),
    "rational": (6, with_tail([(274, 5, 1, tail_offset())], struct.pack("<LL", 12, 2))),
    "fractional rational": (1, with_tail([(274, 5, 1, tail_offset())], struct.pack("<LL", 13, 2))),
    "infinite rational": (1, with_tail([(274, 5, 1, tail_offset())], struct.pack("<LL", 6, 0))),
    "signed rational": (6, with_tail([(274, 10, 1, tail_offset())], struct.pack("<ll", -6, -1))),
    "three shorts": (6, with_tail([(274, 3, 3, tail_offset())], TURN + LEAVE * 2)),
    "64 bits": (6, with_tail([(274, 16, 1, tail_offset())], struct.pack("<Q", 6))),
    "signed byte": (6, with_tail([(274, 6, 1, TURN)])),
    "byte": (1, with_tail([(274, 1, 1, TURN)])),
    "text": (1, with_tail([(274, 2, 2, b"6\0")])),
    "first wins": (6, with_tail([(274, 3, 1, TURN), (274, 3, 1, LEAVE)])),
    "unknown type is passed over": (6, with_tail([(274, 99, 1, LEAVE), (274, 3, 1, TURN)])),
    "no value is passed over": (6, with_tail([(274, 3, 0, LEAVE), (274, 3, 1, TURN)])),
    "value behind the end hides the rest": (1, with_tail([(272, 2, 8, b"\0\1"), (274, 3, 1, TURN)])),
    "value as large as the file is skipped": (6, with_tail([(272, 2, 9999, LARGE), (274, 3, 1, TURN)])),
    "and uses up the budget": (1, with_tail([(272, 2, 9999, LARGE), (274, 5, 1, tail_offset(2))], SIX)),
    "budget just suffices": (6, with_tail([(272, 2, 38, LARGE), (274, 5, 1, tail_offset(2))], SIX)),
    "budget just too small": (1, with_tail([(272, 2, 39, b"\7"), (274, 5, 1, tail_offset(2))], SIX)),
    "cut off behind": (6, with_tail([(274, 3, 1, TURN), (272, 2, 4, b"one")])[:-12]),
    "cut off before": (1, with_tail([(272, 2, 4, b"one"), (274, 3, 1, TURN)])[:-5]),
    "directory behind the end": (1, tiff_header(offset=1000) + directory([(274, 3, 1, TURN)])),
    "only a header": (1, tiff_header()),
}


@pytest.mark.parametrize("case", EXIF_CASES)
def test_odd_exif_directories(case: str) -> None:
    expected, payload = EXIF_CASES[case]
    assert pillow_orientation(payload) == expected
    found = header_exif.orientation_of(payload, None)
    assert (found if found in range(2, 9) else 1) == expected
    assert_same(jpeg(app1_exif(payload)))


VALUES = st.one_of(
    st.integers(0, 9).map(lambda value: struct.pack("<H", value)),
    st.integers(0, 9).map(lambda value: struct.pack(">H", value)),
    st.integers(0, 300).map(lambda value: struct.pack("<L", value)),
    st.sampled_from([struct.pack("<f", 6.0), struct.pack("<f", float("nan")), b"\x06", b"6\0"]),
    st.binary(min_size=4, max_size=4),
)
ENTRIES = st.lists(
    st.tuples(st.sampled_from([274, 274, 256, 257, 272, 700, 34665]), st.integers(0, 18), st.integers(0, 4), VALUES),
    max_size=6,
)
NUMBERS = st.lists(st.integers(0, 12), max_size=12)


@examples(700)
@given(ENTRIES, st.sampled_from("<>"), NUMBERS, st.integers(0, 12), st.booleans())
def test_exif_directories(entries: list[Entry], order: str, tail: list[int], offset: int, cut: bool) -> None:
    payload = tiff_header(order, offset if cut else 8) + directory(entries, order)
    payload += struct.pack(f"{order}{len(tail)}L", *tail)
    payload = payload[: len(payload) - offset] if cut else payload
    expected = pillow_orientation(payload)
    if expected is None:
        with pytest.raises(HeaderError):
            header_exif.exif_orientation(payload)
    else:
        found = header_exif.exif_orientation(payload)
        assert (found if found in range(2, 9) else 1) == expected


@examples(500)
@given(
    st.binary(max_size=40), st.sampled_from([b"", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"II\0*", b"Exif\0\0II*\0"])
)
def test_exif_payloads(payload: bytes, start: bytes) -> None:
    expected = pillow_orientation(start + payload)
    try:
        found = header_exif.orientation_of(start + payload, None)
    except HeaderError:
        assert expected is None
    else:
        assert (found if found in range(2, 9) else 1) == expected


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


@examples(300)
@given(st.lists(st.one_of(st.sampled_from(GIF_EXTENSIONS), st.binary(max_size=6)), max_size=5))
def test_gif_blocks(extensions: list[bytes]) -> None:
    data = gif_with(b"".join(extensions))
    assert_compatible(data)
    assert grow(data) == probe(data)


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
