"""Size, frames and duration of a video from its header: GIF, WebP and MP4. No frame is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from preprocess_service.media.header_bytes import FilePrefix, HeaderError, TruncatedHeader
from preprocess_service.media.header_gif import probe_gif, probe_gif_frames
from preprocess_service.media.header_mp4 import probe_mp4
from preprocess_service.media.header_webp import probe_webp, probe_webp_frames
from preprocess_service.media.headers import check_size, describe

VIDEO_FORMATS: Final = ("GIF", "WEBP", "MP4")
FACTS: Final = "size, number of frames and duration"
DEFAULT_DELAY: Final = 100
"""Milliseconds of a frame that says 0, as in browsers."""
_MAGIC_BYTES: Final = 16
_PICTURE_BRANDS: Final = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"mif1", b"msf1")


@dataclass(frozen=True)
class VideoHeader:
    """What a plan needs to know; the size is that after rotation by `rotation` degrees clockwise."""

    format: str
    width: int
    height: int
    num_frames: int
    seconds: float
    rotation: int = 0


def probe_video(prefix: bytes, total_bytes: int | None = None) -> VideoHeader:
    """The header's facts; HeaderError or TruncatedHeader says why there are none.

    GIF and WebP tell the number of their frames only as a whole; MP4 as soon as its `moov` box is there.
    """
    file = FilePrefix(prefix, total_bytes, FACTS)
    check_size(file)
    file_format = _identify(file)
    try:
        header = _read(file, file_format)
    except TruncatedHeader:
        raise
    except HeaderError as error:
        raise HeaderError(f"{file_format} file: {error}; supported formats: {', '.join(VIDEO_FORMATS)}") from error
    if header.width < 1 or header.height < 1:
        raise HeaderError(f"{file_format} file: no pixels ({header.width}x{header.height})")
    return header


def _identify(file: FilePrefix) -> str:
    start = file.take(0, min(_MAGIC_BYTES, file.total_bytes))
    if start.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        return "WEBP"
    if start[4:8] == b"ftyp" and start[8:12] not in _PICTURE_BRANDS:
        return "MP4"
    raise HeaderError(f"not a supported video: found {describe(start)}; supported formats: {', '.join(VIDEO_FORMATS)}")


def _read(file: FilePrefix, file_format: str) -> VideoHeader:
    if file_format == "MP4":
        found = probe_mp4(file)
        across, down = (found.height, found.width) if found.rotation % 180 else (found.width, found.height)
        return VideoHeader("MP4", across, down, found.num_frames, found.seconds, found.rotation)
    file.require_whole()
    is_gif = file_format == "GIF"
    width, height = probe_gif(file) if is_gif else probe_webp(file)
    delays = probe_gif_frames(file) if is_gif else probe_webp_frames(file)
    return VideoHeader(file_format, width, height, len(delays), sum(delay or DEFAULT_DELAY for delay in delays) / 1000)
