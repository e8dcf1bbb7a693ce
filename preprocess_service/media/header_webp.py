"""WebP: size from the first chunk, orientation from the EXIF and XMP chunks, which come after the pixels.

Simple files (VP8, VP8L) and extended ones (VP8X) that announce neither EXIF nor XMP settle at once, and so does a
square image; otherwise the chunk headers are walked until everything announced is found.
"""

import struct

from preprocess_service.media.header_bytes import FilePrefix, HeaderError, bounded_steps
from preprocess_service.media.header_exif import orientation_of, rotated

_CHUNK = struct.Struct("<4sL")
_RIFF_SIZE = struct.Struct("<L")
_METADATA = {b"EXIF": 0x08, b"XMP ": 0x04}  # announced by these flags; without its flag a chunk is ignored


def probe_webp(file: FilePrefix) -> tuple[int, int]:
    """Size after rotation."""
    riff_end = 8 + file.unpack(_RIFF_SIZE, 4)[0]
    file.require_in_file(riff_end)
    name, size = file.unpack(_CHUNK, 12)
    if name == b"VP8 ":
        return _lossy_size(file.take(20, 10))
    if name == b"VP8L":
        return _lossless_size(file.take(20, 5))
    return _extended_size(file, size, riff_end)


def probe_webp_frames(file: FilePrefix) -> list[int]:
    """Milliseconds of every frame, [0] for a still picture; the file must be whole."""
    end = 8 + file.unpack(_RIFF_SIZE, 4)[0]
    position, steps, delays = 12, bounded_steps("WebP chunks"), list[int]()
    while position + 8 <= end:
        next(steps)
        name, size = file.unpack(_CHUNK, position)
        if name == b"ANMF":
            delays.append(int.from_bytes(file.take(position + 8 + 12, 3), "little"))
        position = _behind(position + 8, size)
    return delays or [0]


def _lossy_size(frame: bytes) -> tuple[int, int]:
    if frame[3:6] != b"\x9d\x01\x2a":
        raise HeaderError("broken WebP: no VP8 start code")
    width, height = struct.unpack_from("<HH", frame, 6)
    return width & 0x3FFF, height & 0x3FFF  # the upper two bits ask for scaling, which decoders leave out


def _lossless_size(frame: bytes) -> tuple[int, int]:
    if frame[0] != 0x2F:
        raise HeaderError("broken WebP: no VP8L signature")
    bits = int.from_bytes(frame[1:], "little")
    return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1


def _extended_size(file: FilePrefix, size: int, riff_end: int) -> tuple[int, int]:
    header = file.take(20, 10)
    width = 1 + int.from_bytes(header[4:7], "little")
    height = 1 + int.from_bytes(header[7:10], "little")
    announced = frozenset(name for name, flag in _METADATA.items() if header[0] & flag)
    if width == height or not announced:
        return width, height
    found = _read_metadata(file, _behind(20, size), riff_end, announced)
    return rotated(width, height, orientation_of(found.get(b"EXIF"), found.get(b"XMP ")))


def _read_metadata(file: FilePrefix, position: int, end: int, announced: frozenset[bytes]) -> dict[bytes, bytes]:
    """The first chunk of each announced name."""
    found: dict[bytes, bytes] = {}
    steps = bounded_steps("WebP chunks")
    while len(found) < len(announced) and position + 8 <= end:
        next(steps)
        name, size = file.unpack(_CHUNK, position)
        if name in announced and name not in found:
            found[name] = file.take(position + 8, size)
        position = _behind(position + 8, size)
    return found


def _behind(start: int, size: int) -> int:
    return start + size + (size & 1)
