"""MP4 and its relatives (QuickTime, M4V): the boxes of the first video track, wherever in the file they are."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

from preprocess_service.media.header_bytes import FilePrefix, HeaderError, bounded_steps

_BOX = struct.Struct(">L4s")
_LARGE = struct.Struct(">Q")
_WORD = struct.Struct(">L")
_SIZE = struct.Struct(">HH")
_MATRIX = struct.Struct(">4l")
_ONE = 1 << 16
_ROTATIONS = {(_ONE, 0, 0, _ONE): 0, (0, _ONE, -_ONE, 0): 90, (-_ONE, 0, 0, -_ONE): 180, (0, -_ONE, _ONE, 0): 270}
"""Upper left of a display matrix -> degrees to turn clockwise."""
_AHEAD = 1 << 16  # bytes worth asking for at once: small boxes in a row, often the whole of `moov`
Span = tuple[int, int]
"""Begin and end of a box's content in the file."""


@dataclass(frozen=True)
class Mp4Header:
    """The first video track: coded size, `rotation` in degrees clockwise, samples and their duration."""

    width: int
    height: int
    rotation: int
    num_frames: int
    seconds: float


def probe_mp4(file: FilePrefix) -> Mp4Header:
    """Walk the boxes; no sample is looked at."""
    steps = bounded_steps("MP4 boxes")
    movie = _find(file, (0, file.total_bytes), b"moov", steps)
    file.require(movie[1])
    for name, track in _boxes(file, movie, steps):
        if name == b"trak" and _is_video(file, track, steps):
            return _read_track(file, track, steps)
    raise HeaderError("no video track")


def _is_video(file: FilePrefix, track: Span, steps: Iterator[None]) -> bool:
    handler = _find(file, _find(file, track, b"mdia", steps), b"hdlr", steps)
    return file.take(handler[0] + 8, 4) == b"vide"


def _read_track(file: FilePrefix, track: Span, steps: Iterator[None]) -> Mp4Header:
    media = _find(file, track, b"mdia", steps)
    table = _find(file, _find(file, media, b"minf", steps), b"stbl", steps)
    width, height = file.unpack(_SIZE, _find(file, table, b"stsd", steps)[0] + 8 + 8 + 24)
    (num_frames,) = file.unpack(_WORD, _find(file, table, b"stsz", steps)[0] + 8)
    seconds = _duration(file, _find(file, media, b"mdhd", steps))
    if not (num_frames and seconds > 0):
        raise HeaderError("no frames in the sample table (fragmented files are not supported)")
    return Mp4Header(width, height, _rotation(file, _find(file, track, b"tkhd", steps)), num_frames, seconds)


def _duration(file: FilePrefix, header: Span) -> float:
    """Seconds, from `mdhd`; version 1 has 64-bit times."""
    if file.byte(header[0]) == 1:
        (rate,), (length,) = file.unpack(_WORD, header[0] + 20), file.unpack(_LARGE, header[0] + 24)
    else:
        (rate,), (length,) = file.unpack(_WORD, header[0] + 12), file.unpack(_WORD, header[0] + 16)
    return length / rate if rate else 0.0


def _rotation(file: FilePrefix, header: Span) -> int:
    start = header[0] + (52 if file.byte(header[0]) == 1 else 40)
    a, b, _, c = file.unpack(_MATRIX, start)
    (d,) = struct.unpack(">l", file.take(start + 16, 4))
    scale = gcd(a, b, c, d) or 1
    turned = tuple(value // scale * _ONE for value in (a, b, c, d))
    if turned not in _ROTATIONS:
        raise HeaderError("a display matrix that is no rotation by quarter turns")
    return _ROTATIONS[turned]


def _find(file: FilePrefix, inside: Span, name: bytes, steps: Iterator[None]) -> Span:
    """The first box of that name; HeaderError if there is none."""
    for found, span in _boxes(file, inside, steps):
        if found == name:
            return span
    raise HeaderError(f"no {name.decode()!r} box")


def _boxes(file: FilePrefix, inside: Span, steps: Iterator[None]) -> Iterator[tuple[bytes, Span]]:
    """Name and content of each box; a box that reaches beyond its parent is an error."""
    position, end = inside
    while position + _BOX.size <= end:
        next(steps)
        if file.num_bytes < position + _BOX.size <= file.total_bytes:
            raise file.needs(position + _AHEAD)
        size, name = file.unpack(_BOX, position)
        start = position + _BOX.size
        if size == 1:
            (size,) = file.unpack(_LARGE, start)
            start += _LARGE.size
        stop = position + size if size else end
        if stop < start or stop > end:
            raise HeaderError(f"truncated or corrupt: box {name!r} at byte {position} ends at {stop}, not before {end}")
        yield name, (start, stop)
        position = stop
