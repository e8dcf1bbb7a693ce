"""EXIF orientation: one reader for TIFF directories, which EXIF payloads are, and the XMP fallback.

The rules are Pillow's (`ImageFileDirectory_v2.load` and `Image.getexif`), quirks included, because the pixels are
rotated by them: the first readable entry of a tag wins, entries of unknown type or size zero do not count, values
stored behind the directory share a budget of one file size, and one value cut off by the end of the file hides every
entry after it. XMP is asked only when EXIF has no orientation tag at all. Not Pillow's own reader: that one decodes
every tag and warns about each odd one, which a hostile file makes slow and loud.
"""

import re
import struct
from dataclasses import dataclass

from preprocess_service.media.header_bytes import MAX_STEPS, FilePrefix, HeaderError

ORIENTATION = 274
TIFF_MAGICS = (b"MM\0\x2a", b"II\x2a\0", b"MM\x2a\0", b"II\0\x2a", b"MM\0\x2b", b"II\x2b\0")

# Tag types: bytes per value, and the struct code of one number (None: text or raw bytes, never a number).
_VALUE_SIZE = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_INTEGER_CODE = {3: "H", 4: "L", 6: "b", 8: "h", 9: "l", 13: "L", 16: "Q"}
_FLOAT_CODE = {11: "f", 12: "d"}
_RATIONAL_CODE = {5: "LL", 10: "ll"}

_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_EXIF_PREFIX = re.compile(rb"(?:Exif\0\0){1,2}")


class UnreadableExifError(HeaderError):
    """The EXIF payload has no TIFF header."""


@dataclass(frozen=True)
class ByteOrder:
    """How a TIFF header says its directories are laid out."""

    code: str  # struct's "<" or ">"
    big: bool  # BigTIFF: 64-bit counts and offsets

    @classmethod
    def of(cls, magic: bytes) -> "ByteOrder":
        """`magic` is one of TIFF_MAGICS. Its third byte decides: big-endian BigTIFF reads as classic, as in Pillow."""
        return cls("<" if magic.startswith(b"II") else ">", magic[2] == 43)


@dataclass(frozen=True)
class TagValue:
    """Where one tag's value lies in its file; read only if somebody asks."""

    file: FilePrefix
    order: ByteOrder
    kind: int
    start: int
    size: int

    def data(self) -> bytes:
        """The raw value."""
        return self.file.take(self.start, self.size)

    def integer(self) -> int | None:
        """The first number, if the tag holds integers."""
        code = _INTEGER_CODE.get(self.kind)
        if code is None:
            return None
        value: int = struct.unpack_from(self.order.code + code, self.data())[0]
        return value

    def orientation(self) -> int:
        """The first number as an orientation, else 0. Pillow compares by equality, so 6.0 and 12/2 count."""
        if (number := self.integer()) is not None:
            return number
        if code := _FLOAT_CODE.get(self.kind):
            (real,) = struct.unpack_from(self.order.code + code, self.data())
            return int(real) if real in range(1, 9) else 0
        if code := _RATIONAL_CODE.get(self.kind):
            numerator, denominator = struct.unpack_from(self.order.code + code, self.data())
            return numerator // denominator if denominator and numerator % denominator == 0 else 0
        return 0


def read_directory(file: FilePrefix, offset: int, order: ByteOrder, wanted: frozenset[int]) -> dict[int, TagValue]:
    """Find the wanted tags of the directory at `offset`."""
    count_layout = struct.Struct(order.code + ("Q" if order.big else "H"))
    entry_layout = struct.Struct(order.code + ("HHQ8s" if order.big else "HHL4s"))
    first_entry = offset + count_layout.size
    if first_entry > file.total_bytes:
        return {}
    count = min(file.unpack(count_layout, offset)[0], (file.total_bytes - first_entry) // entry_layout.size)
    if count > MAX_STEPS:
        raise HeaderError(f"more than {MAX_STEPS} tags")
    entries = file.take(first_entry, count * entry_layout.size)
    return _find_tags(file, order, entry_layout, entries, first_entry, wanted)


def _find_tags(
    file: FilePrefix, order: ByteOrder, layout: struct.Struct, entries: bytes, first: int, wanted: frozenset[int]
) -> dict[int, TagValue]:
    inline = 8 if order.big else 4
    seen: set[int] = set()
    found: dict[int, TagValue] = {}
    budget = file.total_bytes
    for index, (tag, kind, count, value) in enumerate(layout.iter_unpack(entries)):
        size = count * _VALUE_SIZE.get(kind, 0)
        if tag in seen or not size:
            continue
        start = first + (index + 1) * layout.size - inline
        if size > inline:
            (start,) = struct.unpack(order.code + ("Q" if order.big else "L"), value)
            if start >= 1 << 63:
                continue
            budget -= size
            if budget < 0:
                continue
            if start + size > file.total_bytes:
                break
        seen.add(tag)
        if tag in wanted:
            found[tag] = TagValue(file, order, kind, start, size)
            if len(found) == len(wanted):
                break
    return found


def orientation_of(exif: bytes | None, xmp: bytes | None) -> int:
    """The orientation that Pillow would apply, given an image's EXIF payload and XMP packet (1: none)."""
    orientation = exif_orientation(exif) if exif else None
    if orientation is not None:
        return orientation
    return xmp_orientation(xmp) if xmp else 1


def exif_orientation(payload: bytes) -> int | None:
    """The orientation tag of an EXIF payload (0: its value is none); None if it has no such tag."""
    prefix = _EXIF_PREFIX.match(payload)
    payload = payload[prefix.end() :] if prefix else payload
    if not payload:
        return None
    # BigTIFF needs a 16-byte header, which Pillow does not read here: it refuses such a payload.
    if len(payload) < 8 or not payload.startswith(TIFF_MAGICS) or ByteOrder.of(payload).big:
        raise UnreadableExifError(f"unreadable EXIF: no TIFF header in {payload[:8]!r}")
    order = ByteOrder.of(payload)
    (offset,) = struct.unpack_from(order.code + "L", payload, 4)
    file = FilePrefix(payload)
    tag = read_directory(file, offset, order, frozenset({ORIENTATION})).get(ORIENTATION)
    return tag.orientation() if tag else None


def xmp_orientation(xmp: bytes) -> int:
    """The orientation in an XMP packet, found the way Pillow finds it: by its text, without parsing XML."""
    match = _XMP_ORIENTATION.search(xmp)
    return int(match[1]) if match else 1


def rotated(width: int, height: int, orientation: int) -> tuple[int, int]:
    """Size after applying an orientation: 5 to 8 exchange the sides."""
    return (height, width) if orientation in (5, 6, 7, 8) else (width, height)
