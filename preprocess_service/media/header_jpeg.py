"""JPEG (MPO included): size and orientation from the segments before the first scan.

Settles at SOS: EXIF after the frame header still counts, and the last frame header wins, as in Pillow.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from preprocess_service.media.header_bytes import FilePrefix, HeaderError, bounded_steps
from preprocess_service.media.header_exif import UnreadableExifError, orientation_of, rotated

_SOS, _APP0, _APP1 = 0xDA, 0xE0, 0xE1
# DHP (0xDE) has the layout of a frame header, and Pillow reads it as one.
_FRAME_HEADERS = frozenset({*range(0xC0, 0xD0), 0xDE} - {0xC4, 0xC8, 0xCC})
_WITHOUT_LENGTH = frozenset({0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)})

# Fill bytes (FF FF), stuffed bytes (FF 00) and anything else between segments are skipped.
_MARKER = re.compile(rb"\xff[^\xff\x00]", re.DOTALL)
_LENGTH = struct.Struct(">H")
_SIZE = struct.Struct(">HH")


@dataclass
class _Facts:
    size: tuple[int, int] | None = None
    exif: list[bytes] = field(default_factory=list)
    xmp: bytes | None = None
    has_density: bool = False

    def orientation(self) -> int:
        # Without a JFIF density Pillow looks for one in the EXIF on opening, swallows the error of an unreadable
        # payload, and from then on takes the image for one without orientation, XMP or not.
        try:
            return orientation_of(b"".join(self.exif) if self.exif else None, self.xmp)
        except UnreadableExifError:
            if self.has_density:
                raise
            return 1


def probe_jpeg(file: FilePrefix) -> tuple[int, int]:
    """Size after rotation."""
    facts = _Facts()
    for marker, start, length in _segments(file):
        if marker in _FRAME_HEADERS:
            facts.size = _frame_size(file.take(start, length))
        elif marker == _APP0:
            facts.has_density |= _has_density(file.take(start, length))
        elif marker == _APP1:
            _read_app1(facts, file, start, length)
    if facts.size is None:
        raise HeaderError("truncated or broken: no frame header before the first scan, so no size")
    return rotated(*facts.size, facts.orientation())


def _segments(file: FilePrefix) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, start, length) of each segment's body before the first scan."""
    position = 2  # the third byte of the magic is the first byte of the first marker
    for _ in bounded_steps("JPEG markers"):
        found = _next_marker(file, position)
        if found is None:
            return
        marker, position = found
        if marker in _WITHOUT_LENGTH:
            continue
        (length,) = file.unpack(_LENGTH, position)
        start, position = position + 2, position + max(2, length)
        file.require_in_file(position)
        if marker == _SOS:
            return
        yield marker, start, position - start


def _next_marker(file: FilePrefix, position: int) -> tuple[int, int] | None:
    """The next marker and the position behind it; None at the end of the file."""
    match = file.search(_MARKER, position, 4)  # a marker and a length
    if match is None:
        return None
    marker = file.data[match.end() - 1]
    if marker < 0xC0:
        raise HeaderError(f"broken JPEG: no marker at byte {match.start()} (found ff {marker:02x})")
    return marker, match.end()


def _frame_size(body: bytes) -> tuple[int, int]:
    if len(body) < 6 or len(body) % 3:
        raise HeaderError("broken JPEG: frame header of the wrong length")
    if body[0] != 8 or body[5] not in (1, 3, 4):
        raise HeaderError(f"unsupported JPEG: {body[0]} bits, {body[5]} components (supported: 8 bits; 1, 3 or 4)")
    height, width = _SIZE.unpack_from(body, 1)
    return width, height


def _has_density(body: bytes) -> bool:
    return body.startswith(b"JFIF") and len(body) >= 12 and body[7] in (1, 2)


def _read_app1(facts: _Facts, file: FilePrefix, start: int, length: int) -> None:
    body = file.take(start, length)
    if body.startswith(b"Exif\0\0"):
        facts.exif.append(body[6:] if facts.exif else body)
    elif body.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
        facts.xmp = body.split(b"\0", 1)[1]
