"""PNG and APNG: size from IHDR, orientation from eXIf or text chunks, which may come after the pixels.

The whole chain of chunk headers is walked, skipping pixel data, because the last orientation in the file wins. Two
things settle a prefix sooner: a square image, whose size no rotation changes, and an EXIF orientation before the
pixels. (The PNG specification allows one eXIf chunk; in a file that breaks this rule, a second one behind the prefix
goes unseen.)

Stricter than Pillow: the first IHDR must be valid, and orientation texts may unpack to 4 MiB in total where Pillow
allows 64. Laxer: checksums are verified only for chunks that are read.
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from preprocess_service.media.header_bytes import FilePrefix, HeaderError, TruncatedHeader, bounded_steps
from preprocess_service.media.header_exif import exif_orientation, orientation_of, rotated

_CHUNK = struct.Struct(">L4s")
_CHECKSUM = struct.Struct(">L")
_IHDR = struct.Struct(">LLBBBBB")
_NAME = re.compile(rb"\w{4}")
_BIT_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # by colour type

# Text keywords that Pillow lets into its EXIF and XMP look-ups. "default_image" is here because Pillow keeps its own
# flag of that name in the same dictionary.
_EXIF, _EXIF_TEXT, _XMP, _XMP_RAW, _DEFAULT_IMAGE = (
    b"exif",
    b"Raw profile type exif",
    b"XML:com.adobe.xmp",
    b"xmp",
    b"default_image",
)
_KEYWORDS = frozenset({_EXIF, _EXIF_TEXT, _XMP, _XMP_RAW, _DEFAULT_IMAGE})
_MAX_KEYWORD = max(map(len, _KEYWORDS))

_MAX_TEXT = 1 << 20  # Pillow's limit for one compressed text
_MAX_ALL_TEXT = 4 << 20


@dataclass
class _Facts:
    size: tuple[int, int] | None = None
    info: dict[bytes, bytes] = field(default_factory=dict)
    num_frames: int | None = None
    has_frame_control: bool = False
    num_text_bytes: int = 0

    @property
    def is_animated(self) -> bool:
        if self.num_frames is None:
            return False
        has_default_image = not self.has_frame_control or bool(self.info.get(_DEFAULT_IMAGE))
        return self.num_frames + has_default_image > 1

    def exif(self) -> bytes | None:
        exif = self.info.get(_EXIF)
        if exif is None and _EXIF_TEXT in self.info:
            return _from_hex(self.info[_EXIF_TEXT])
        return exif

    def orientation(self) -> int:
        return orientation_of(self.exif(), self.info.get(_XMP) or self.info.get(_XMP_RAW))

    def has_exif_orientation(self) -> bool:
        exif = self.info.get(_EXIF)
        return exif is not None and exif_orientation(exif) is not None


def probe_png(file: FilePrefix) -> tuple[int, int]:
    """Size after rotation."""
    facts = _Facts()
    position = _read_until_pixels(file, facts)
    if facts.size is None:
        raise HeaderError("broken PNG: no IHDR chunk before the pixels, so no size")
    if facts.size[0] != facts.size[1]:
        _read_after_pixels(file, facts, position)
    return rotated(*facts.size, facts.orientation())


def _read_until_pixels(file: FilePrefix, facts: _Facts) -> int:
    position, steps = 8, bounded_steps("PNG chunks")
    while True:
        next(steps)
        length, name = file.unpack(_CHUNK, position)
        if not _NAME.fullmatch(name):
            raise HeaderError(f"broken PNG: {name!r} at byte {position + 4} is no chunk name")
        if name in (b"IDAT", b"fdAT", b"IEND"):
            return position
        file.require_in_file(position + length + 12)
        if reader := _READERS.get(name):
            reader(facts, _Chunk(file, name, position + 8, length, verify=True))
        position += length + 12


def _read_after_pixels(file: FilePrefix, facts: _Facts, position: int) -> None:
    try:
        _read_trailing_chunks(file, facts, position)
    except TruncatedHeader:
        if not facts.has_exif_orientation():
            raise


def _read_trailing_chunks(file: FilePrefix, facts: _Facts, position: int) -> None:
    """What does not fit the file ends the walk without an error: the size is known and the pixels may be whole."""
    end_name = b"fcTL" if facts.is_animated else b"IEND"
    steps = bounded_steps("PNG chunks")
    for _ in steps:
        position = _skip_pixels(file, position, steps)
        if position + 8 > file.total_bytes:
            return
        length, name = file.unpack(_CHUNK, position)
        if name in (b"IEND", end_name) or not _NAME.fullmatch(name) or position + 8 + length > file.total_bytes:
            return
        if reader := _TRAILING_READERS.get(name):
            reader(facts, _Chunk(file, name, position + 8, length, verify=False))
        position += length + 12


def _skip_pixels(file: FilePrefix, position: int, steps: Iterator[None]) -> int:
    """The fast path: nearly all chunks of a file are IDAT, 8 KiB each as many encoders write them."""
    data, unpack, last = file.data, _CHUNK.unpack_from, file.num_bytes - _CHUNK.size
    while position <= last:
        length, name = unpack(data, position)
        if name != b"IDAT":
            break
        position += length + 12
        next(steps)
    return position


@dataclass(frozen=True)
class _Chunk:
    file: FilePrefix
    name: bytes
    start: int
    length: int
    verify: bool  # Pillow checks no checksum behind the pixels

    def body(self) -> bytes:
        body = self.file.take(self.start, self.length)
        if self.verify:
            (checksum,) = self.file.unpack(_CHECKSUM, self.start + self.length)
            if checksum != zlib.crc32(body, zlib.crc32(self.name)):
                raise HeaderError(f"broken PNG: wrong checksum of chunk {self.name.decode()}")
        return body

    def keyword(self) -> bytes:
        """The keyword of a text chunk, cut off where it is too long to be one that matters."""
        return self.file.take(self.start, min(self.length, _MAX_KEYWORD + 1)).split(b"\0", 1)[0]


def _read_ihdr(facts: _Facts, chunk: _Chunk) -> None:
    body = chunk.body()
    if len(body) < _IHDR.size:
        raise HeaderError(f"broken PNG: IHDR of {len(body)} bytes")
    width, height, depth, colour, _, filtering, _ = _IHDR.unpack_from(body)
    if depth not in _BIT_DEPTHS.get(colour, ()) or filtering:
        raise HeaderError(f"broken PNG: colour type {colour} with {depth} bits, filter {filtering}")
    facts.size = width, height


def _read_frame_count(facts: _Facts, chunk: _Chunk) -> None:
    body = chunk.body()
    if len(body) < 8:
        raise HeaderError(f"broken PNG: acTL of {len(body)} bytes")
    count = int.from_bytes(body[:4], "big")
    if facts.num_frames is not None:
        facts.num_frames = None
    elif 0 < count <= 0x80000000:
        facts.num_frames = count


def _read_frame_control(facts: _Facts, chunk: _Chunk) -> None:
    facts.has_frame_control = True


def _read_exif(facts: _Facts, chunk: _Chunk) -> None:
    facts.info[_EXIF] = b"Exif\0\0" + chunk.body()


def _read_text(facts: _Facts, chunk: _Chunk) -> None:
    if chunk.keyword() in _KEYWORDS:
        keyword, _, text = chunk.body().partition(b"\0")
        facts.info[keyword] = text


def _read_compressed_text(facts: _Facts, chunk: _Chunk) -> None:
    if chunk.keyword() not in _KEYWORDS:
        return
    keyword, _, text = chunk.body().partition(b"\0")
    if text[:1] not in (b"", b"\0"):
        raise HeaderError(f"broken PNG: text compressed by unknown method {text[0]}")
    facts.info[keyword] = _decompress(facts, text[1:]) or b""


def _read_international_text(facts: _Facts, chunk: _Chunk) -> None:
    if chunk.keyword() not in _KEYWORDS:
        return
    keyword, _, rest = chunk.body().partition(b"\0")
    fields = rest[2:].split(b"\0", 2)
    if len(rest) < 2 or len(fields) < 3:
        return
    language, translated, text = fields
    if rest[0]:
        unpacked = _decompress(facts, text) if rest[1] == 0 else None
        if unpacked is None:
            return
        text = unpacked
    if keyword == _XMP:
        facts.info[_XMP_RAW] = text
    if all(map(_is_utf8, (language, translated, text))):
        facts.info[keyword] = text


def _decompress(facts: _Facts, packed: bytes) -> bytes | None:
    """None where the data is damaged, which Pillow passes over; an error where it is too large."""
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(packed, _MAX_TEXT)
    except zlib.error:
        # How much came out before the damage is not known; deflate expands 1032 times at most.
        _charge(facts, min(_MAX_TEXT, 1032 * len(packed)))
        return None
    if unpacker.unconsumed_tail:
        raise HeaderError(f"PNG text too large: more than {_MAX_TEXT} bytes in one chunk")
    _charge(facts, len(text))
    return text


def _charge(facts: _Facts, num_bytes: int) -> None:
    facts.num_text_bytes += num_bytes
    if facts.num_text_bytes > _MAX_ALL_TEXT:
        raise HeaderError(f"PNG text too large: more than {_MAX_ALL_TEXT} bytes in all")


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _from_hex(text: bytes) -> bytes:
    """The payload of a "Raw profile type exif": an empty line, a name and a length, then hexadecimal lines."""
    if len(text) > _MAX_ALL_TEXT:
        raise HeaderError(f"PNG text too large: raw EXIF profile of {len(text)} bytes")
    lines = text.split(b"\n", 3)
    try:
        return bytes.fromhex(lines[3].replace(b"\n", b"").decode("latin-1")) if len(lines) == 4 else b""
    except ValueError as error:
        raise HeaderError("unreadable EXIF: the raw profile text of this PNG is not hexadecimal") from error


_Reader = Callable[[_Facts, _Chunk], None]
_TRAILING_READERS: dict[bytes, _Reader] = {
    b"eXIf": _read_exif,
    b"tEXt": _read_text,
    b"zTXt": _read_compressed_text,
    b"iTXt": _read_international_text,
}
_READERS: dict[bytes, _Reader] = {
    **_TRAILING_READERS,
    b"IHDR": _read_ihdr,
    b"acTL": _read_frame_count,
    b"fcTL": _read_frame_control,
}
