"""Image files of every kind a client may send."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import Any, Final

import numpy as np
from PIL import Image, ImageSequence

ORIENTATION: Final = 0x0112


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, 4]: slopes with noise, so that every resampling step shows."""
    y, x = np.mgrid[0:height, 0:width]
    slopes = np.stack([x * 3 + y, 255 - y * 2, (x * y) // 7, 40 + x + y], axis=-1)
    return (slopes + np.random.default_rng(seed).integers(0, 90, slopes.shape)).astype(np.uint8)


def rgba(height: int, width: int) -> Image.Image:
    return Image.fromarray(pixels(height, width))


def rgb(height: int, width: int) -> Image.Image:
    return Image.fromarray(pixels(height, width)[..., :3])


def palette(height: int, width: int) -> Image.Image:
    return rgb(height, width).quantize(17)


def grey16(height: int, width: int) -> Image.Image:
    return Image.fromarray(pixels(height, width).astype(np.uint16)[..., 0] * 257 % 40009)


def png48(height: int, width: int) -> bytes:
    """RGB with 16 bits per channel, which Pillow reads and does not write."""
    rows = (pixels(height, width)[..., :3].astype(">u2") * 257 - 77).reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def file_of(image: Image.Image, image_format: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def rotated(image_format: str, orientation: int) -> Callable[[int, int], bytes]:
    """A file that says it is to be turned or mirrored."""

    def make(height: int, width: int) -> bytes:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        return file_of(rgb(height, width), image_format, exif=exif.tobytes())

    return make


def animated(image_format: str, **options: Any) -> Callable[[int, int], bytes]:
    """Three frames; only the first counts."""

    def make(height: int, width: int) -> bytes:
        frames = [Image.fromarray(pixels(height, width, seed)) for seed in range(3)]
        return file_of(frames[0], image_format, save_all=True, append_images=frames[1:], duration=50, **options)

    return make


def plain(image_format: str, make: Callable[[int, int], Image.Image], **options: Any) -> Callable[[int, int], bytes]:
    return lambda height, width: file_of(make(height, width), image_format, **options)


def in_mode(mode: str) -> Callable[[int, int], Image.Image]:
    return lambda height, width: rgba(height, width).convert(mode)


KINDS: Final[dict[str, Callable[[int, int], bytes]]] = {
    "png-rgb": plain("PNG", rgb),
    "png-rgb-transparent": plain("PNG", rgb, transparency=(3, 255, 0)),
    "png-rgba": plain("PNG", rgba),
    "png-la": plain("PNG", in_mode("LA")),
    "png-palette": plain("PNG", palette),
    "png-palette-transparent": plain("PNG", palette, transparency=2),
    "png-palette-alpha": plain("PNG", palette, transparency=bytes(range(0, 170, 10))),
    "png-grey": plain("PNG", in_mode("L")),
    "png-grey-transparent": plain("PNG", in_mode("L"), transparency=60),
    "png-1-bit": plain("PNG", in_mode("1")),
    "png-16-bit": plain("PNG", grey16),
    "png-48-bit": png48,
    "png-rotated": rotated("PNG", 6),
    "apng": animated("PNG"),
    "apng-default-image": animated("PNG", default_image=True),
    "jpeg": plain("JPEG", rgb, quality=90),
    "jpeg-444": plain("JPEG", rgb, quality=95, subsampling=0),
    "jpeg-progressive": plain("JPEG", rgb, progressive=True),
    "jpeg-grey": plain("JPEG", in_mode("L")),
    "jpeg-cmyk": plain("JPEG", lambda height, width: rgb(height, width).convert("CMYK")),
    **{f"jpeg-orientation-{number}": rotated("JPEG", number) for number in range(1, 9)},
    "webp": plain("WEBP", rgb),
    "webp-lossless-rgba": plain("WEBP", rgba, lossless=True),
    "webp-rotated": rotated("WEBP", 8),
    "webp-animated": animated("WEBP", lossless=True),
    "gif": plain("GIF", palette),
    "gif-transparent": plain("GIF", palette, transparency=1),
    "gif-animated": animated("GIF"),
    "bmp": plain("BMP", rgb),
    "bmp-1-bit": plain("BMP", in_mode("1")),
    "tiff": plain("TIFF", rgb),
    "tiff-rgba": plain("TIFF", rgba),
    "tiff-cmyk": plain("TIFF", lambda height, width: rgb(height, width).convert("CMYK")),
    "tiff-16-bit": plain("TIFF", grey16),
    "tiff-rotated": rotated("TIFF", 5),
}


def num_frames(data: bytes) -> int:
    """Frames of a file."""
    with Image.open(BytesIO(data)) as image:
        return sum(1 for _ in ImageSequence.Iterator(image))
