"""Builds image files with an orientation in every odd place, and asks the reference what is in them."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from preprocess_service.media.headers import SUPPORTED_FORMATS, HeaderError, ImageHeader, TruncatedHeader, probe_image


def examples(count: int) -> settings:
    return settings(max_examples=count, derandomize=True, database=None)


ORIENTATIONS = range(10)  # 0 and 9 are none


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
