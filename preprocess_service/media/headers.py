"""Size of an image after EXIF rotation, from its header: no pixel is decoded and no pixel data is read.

The answer is that of the reference, `PIL.Image.open` and `PIL.ImageOps.exif_transpose`, for every file that the
reference can load. Files that only one of the two accepts:

- `probe_image` is laxer where the pixels, palettes or parts of the header that say nothing about the size are
  damaged; loading such a file fails later.
- It is stricter about what no honest file needs: more than `MAX_STEPS` segments, chunks, blocks or tags, and the few
  points listed in `header_png`. The magic number alone decides on the format.

One module per container (`header_jpeg`, `header_png`, ...) walks over its segments or chunks; all of them share
`header_exif` and the bounded view in `header_bytes`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from preprocess_service.media.header_bmp import probe_bmp
from preprocess_service.media.header_bytes import SUPPORTED_FORMATS, FilePrefix, HeaderError, TruncatedHeader
from preprocess_service.media.header_exif import TIFF_MAGICS
from preprocess_service.media.header_gif import probe_gif
from preprocess_service.media.header_jpeg import probe_jpeg
from preprocess_service.media.header_png import probe_png
from preprocess_service.media.header_tiff import probe_tiff
from preprocess_service.media.header_webp import probe_webp

__all__ = ["SUPPORTED_FORMATS", "HeaderError", "ImageHeader", "TruncatedHeader", "probe_image"]

_MAX_MAGIC = 16
_PROBES: dict[str, Callable[[FilePrefix], tuple[int, int]]] = {
    "BMP": probe_bmp,
    "GIF": probe_gif,
    "JPEG": probe_jpeg,
    "PNG": probe_png,
    "TIFF": probe_tiff,
    "WEBP": probe_webp,
}
_MAGICS: dict[str, tuple[bytes, ...]] = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "BMP": (b"BM",),
    "TIFF": TIFF_MAGICS,
}
# What people send by mistake, named so that the error says more than eight bytes would: (offset, magic, name).
_UNSUPPORTED = (
    (4, b"ftypavi", "AVIF"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftyphev", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (4, b"ftyp", "an MP4 or QuickTime file"),
    (4, b"jP  ", "JPEG 2000"),
    (4, b"JXL ", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"8BPS", "a Photoshop document"),
    (0, b"%PDF", "PDF"),
    (0, b"<svg", "SVG"),
    (0, b"<?xml", "XML"),
    (0, b"<!DOCTYPE", "an HTML page"),
    (0, b"<!doctype", "an HTML page"),
    (0, b"<html", "an HTML page"),
)


@dataclass(frozen=True)
class ImageHeader:
    """What a plan needs to know of an image."""

    format: str  # Pillow's name ("JPEG", "WEBP"); MPO counts as JPEG
    width: int  # after EXIF rotation, pixels
    height: int


def probe_image(prefix: bytes | memoryview, total_bytes: int | None = None) -> ImageHeader:
    """Read the header of an image of which `prefix` is the beginning.

    `total_bytes` is the size of the whole file; None: `prefix` is all of it. Raises `TruncatedHeader` if a longer
    prefix is needed, `HeaderError` if none would do.
    """
    file = FilePrefix(prefix, total_bytes)
    check_size(file)
    image_format = _identify(file)
    try:
        width, height = _PROBES[image_format](file)
    except TruncatedHeader:
        raise
    except HeaderError as error:
        raise HeaderError(f"{image_format} file: {error}; supported formats: {_supported()}") from error
    if width <= 0 or height <= 0:
        raise HeaderError(f"{image_format} file: no pixels ({width}x{height}); supported formats: {_supported()}")
    return ImageHeader(image_format, width, height)


def check_size(file: FilePrefix) -> None:
    """HeaderError for a file without bytes, or with fewer than its prefix."""
    if file.total_bytes == 0 and file.num_bytes == 0:
        raise HeaderError("empty file (0 bytes)")
    if file.total_bytes < file.num_bytes:
        raise HeaderError(f"total size of {file.total_bytes} bytes given with a prefix of {file.num_bytes}")


def _identify(file: FilePrefix) -> str:
    start = bytes(file.data[:_MAX_MAGIC])
    for name, magics in _MAGICS.items():
        if start.startswith(magics):
            return name
    if start.startswith(b"RIFF") and start[8:12] == b"WEBP" and start[12:16] in (b"VP8 ", b"VP8L", b"VP8X"):
        return "WEBP"
    if len(start) < min(_MAX_MAGIC, file.total_bytes):
        raise file.needs(_MAX_MAGIC)
    raise HeaderError(f"not a supported image: found {describe(start)}; supported formats: {_supported()}")


def describe(start: bytes) -> str:
    """What a file that begins like this is, for messages."""
    for offset, magic, name in _UNSUPPORTED:
        if start.startswith(magic, offset):
            return name
    return f"a file starting with {start[:8]!r}"


def _supported() -> str:
    return ", ".join(SUPPORTED_FORMATS)
