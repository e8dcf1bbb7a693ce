"""GIF: the logical screen, which grows where the first frame sticks out of it. GIF has no orientation.

The walk over the extensions before the first frame is Pillow's, which differs from the specification where an
extension is empty or a NETSCAPE block lacks its data: there it reads on behind the terminator.
"""

import re
import struct
from collections.abc import Iterator

from preprocess_service.media.header_bytes import FilePrefix, HeaderError, bounded_steps

_SCREEN = struct.Struct("<HHB")
_FRAME = struct.Struct("<HHHHB")
_BLOCK = re.compile(rb"[!,;]")
_CONTROL, _COMMENT, _APPLICATION = 0xF9, 0xFE, 0xFF
MAX_FRAME_STEPS = 1 << 19  # blocks of at most 255 bytes: twice what 64 MiB of pixels need


def probe_gif(file: FilePrefix) -> tuple[int, int]:
    """Size of the first frame as displayed."""
    width, height, flags = file.unpack(_SCREEN, 6)
    start = _first_frame(file, 13 + _palette_size(flags))
    left, top, frame_width, frame_height, flags = file.unpack(_FRAME, start)
    # One more byte, the code size, stands before the pixels; without it Pillow does not open the file.
    file.require_in_file(start + _FRAME.size + _palette_size(flags) + 1)
    return max(width, left + frame_width), max(height, top + frame_height)


def probe_gif_frames(file: FilePrefix) -> list[int]:
    """Milliseconds of every frame, 0 where none are given; the file must be whole."""
    _, _, flags = file.unpack(_SCREEN, 6)
    position, delay, delays = 13 + _palette_size(flags), 0, list[int]()
    steps = bounded_steps("GIF blocks", MAX_FRAME_STEPS)
    while (match := file.search(_BLOCK, position, 1)) is not None and match[0] != b";":
        next(steps)
        position = match.end()
        if match[0] == b"!":
            if file.byte(position) == _CONTROL and file.byte(position + 1) == 4:
                delay = 10 * int.from_bytes(file.take(position + 3, 2), "little")
            position = _skip_extension(file, position, steps)
        else:
            *_, flags = file.unpack(_FRAME, position)
            position = _skip_blocks(file, position + _FRAME.size + _palette_size(flags) + 1, steps)
            delays.append(delay)
    return delays


def _palette_size(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _first_frame(file: FilePrefix, position: int) -> int:
    steps = bounded_steps("GIF blocks")
    while True:
        next(steps)
        match = file.search(_BLOCK, position, 1)
        if match is None:
            raise HeaderError("truncated: the file ends before its first image")
        if match[0] == b";":
            raise HeaderError("GIF without an image")
        if match[0] == b",":
            return match.end()
        position = _skip_extension(file, match.end(), steps)


def _skip_extension(file: FilePrefix, position: int, steps: Iterator[None]) -> int:
    """`position` is at the extension's label; returns the position behind the extension."""
    label, length = file.byte(position), file.byte(position + 1)
    first, position = position + 2, position + 2 + length
    if label == _COMMENT and length == 0:
        return position
    if label == _APPLICATION and length >= 11 and file.take(first, 11) == b"NETSCAPE2.0":
        position += 1 + file.byte(position)
    return _skip_blocks(file, position, steps)


def _skip_blocks(file: FilePrefix, position: int, steps: Iterator[None]) -> int:
    while length := file.byte(position):
        position += 1 + length
        next(steps)
    return position + 1
