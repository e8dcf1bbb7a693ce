"""TIFF and BigTIFF: size and orientation from the first directory, wherever in the file it lies."""

import struct

from preprocess_service.media.header_bytes import FilePrefix, HeaderError
from preprocess_service.media.header_exif import (
    ORIENTATION,
    ByteOrder,
    TagValue,
    read_directory,
    rotated,
    xmp_orientation,
)

_WIDTH, _HEIGHT, _XMP = 256, 257, 700
_TAGS = frozenset({_WIDTH, _HEIGHT, ORIENTATION, _XMP})
_BYTE, _UNDEFINED = 1, 7


def probe_tiff(file: FilePrefix) -> tuple[int, int]:
    """Size after rotation."""
    order = ByteOrder.of(file.take(0, 4))
    offset_layout = struct.Struct(order.code + ("Q" if order.big else "L"))
    (offset,) = file.unpack(offset_layout, 8 if order.big else 4)
    if offset == 0:
        raise HeaderError("TIFF without an image")
    file.require_in_file(offset + 2)
    tags = read_directory(file, offset, order, _TAGS)
    width, height = _side(tags, _WIDTH), _side(tags, _HEIGHT)
    return rotated(width, height, _orientation(tags))


def _side(tags: dict[int, TagValue], tag: int) -> int:
    value = tags[tag].integer() if tag in tags else None
    if value is None:
        raise HeaderError("TIFF without a width and a height")
    return value


def _orientation(tags: dict[int, TagValue]) -> int:
    if ORIENTATION in tags:
        return tags[ORIENTATION].orientation()
    xmp = tags.get(_XMP)
    return xmp_orientation(xmp.data()) if xmp and xmp.kind in (_BYTE, _UNDEFINED) else 1
