"""Length and sampling rate of audio files from their headers: WAV, FLAC and OGG. No sample is decoded."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Final

from preprocess_service.media.header_bytes import FilePrefix, HeaderError, bounded_steps
from preprocess_service.media.headers import check_size, describe

AUDIO_FORMATS: Final = ("WAV", "FLAC", "OGG")
MAX_CHANNELS: Final = 8
MAX_SAMPLE_RATE: Final = 192_000
FACTS: Final = "length and sampling rate"
_CHUNK: Final = struct.Struct("<4sL")
_FORMAT: Final = struct.Struct("<HHLLHH")
_PLAIN: Final = {1: "PCM", 3: "float", 6: "A-law", 7: "mu-law"}
_EXTENSIBLE: Final = 0xFFFE
_MAGICS: Final = {"WAV": b"RIFF", "FLAC": b"fLaC", "OGG": b"OggS"}


@dataclass(frozen=True)
class AudioHeader:
    """What a plan needs to know: samples per channel, at the file's own rate in Hz."""

    format: str
    num_samples: int
    sample_rate: int
    num_channels: int

    def num_samples_at(self, sample_rate: int) -> int:
        """Samples after resampling, rounded up."""
        return -(-self.num_samples * sample_rate // self.sample_rate)


def probe_audio(prefix: bytes, total_bytes: int | None = None) -> AudioHeader:
    """The header's facts; HeaderError or TruncatedHeader says why there are none. OGG needs the whole file."""
    file = FilePrefix(prefix, total_bytes, FACTS)
    check_size(file)
    file_format = _identify(file)
    try:
        header = _PROBES[file_format](file)
    except HeaderError as error:
        if type(error) is not HeaderError:
            raise
        raise HeaderError(f"{file_format} file: {error}; supported formats: {', '.join(AUDIO_FORMATS)}") from error
    _check(header)
    return header


def _identify(file: FilePrefix) -> str:
    start = file.take(0, min(12, file.total_bytes))
    for name, magic in _MAGICS.items():
        if start.startswith(magic) and (name != "WAV" or start[8:12] == b"WAVE"):
            return name
    supported = ", ".join(AUDIO_FORMATS)
    raise HeaderError(f"not supported audio: found {describe(start)}; supported formats: {supported}")


def _check(header: AudioHeader) -> None:
    """Bounds on what decoding may take."""
    if header.num_samples < 1 or header.sample_rate < 1:
        raise HeaderError(f"{header.format} file: no samples ({header.num_samples} at {header.sample_rate} Hz)")
    for what, actual, most in (
        ("channels", header.num_channels, MAX_CHANNELS), ("Hz", header.sample_rate, MAX_SAMPLE_RATE),
    ):  # fmt: skip
        if actual > most:
            raise HeaderError(f"{header.format} file: {actual} {what}; at most {most} are supported")


def _probe_wav(file: FilePrefix) -> AudioHeader:
    position, steps, fields = 12, bounded_steps("WAV chunks"), None
    while True:
        next(steps)
        name, size = file.unpack(_CHUNK, position)
        position += _CHUNK.size
        if name == b"fmt ":
            fields = _read_format(file, position, size)
        elif name == b"data":
            break
        position += size + (size & 1)
    if fields is None:
        raise HeaderError("samples without a format before them")
    file.require_in_file(position + size)
    channels, rate, frame_bytes = fields
    return AudioHeader("WAV", size // frame_bytes, rate, channels)


def _read_format(file: FilePrefix, position: int, size: int) -> tuple[int, int, int]:
    """(channels, rate, bytes of one sample of all channels)."""
    kind, channels, rate, _, frame_bytes, _ = file.unpack(_FORMAT, position)
    if kind == _EXTENSIBLE and size >= 40:
        kind = int.from_bytes(file.take(position + 24, 2), "little")
    if kind not in _PLAIN:
        raise HeaderError(f"samples of kind {kind}; supported: {', '.join(_PLAIN.values())}")
    if not (channels and frame_bytes):
        raise HeaderError(f"{channels} channels in {frame_bytes} bytes")
    return channels, rate, frame_bytes


def _probe_flac(file: FilePrefix) -> AudioHeader:
    """STREAMINFO comes first; its last 64 bits are rate (20), channels - 1 (3), bits - 1 (5) and length (36)."""
    if file.byte(4) & 0x7F:
        raise HeaderError("no STREAMINFO block")
    bits = int.from_bytes(file.take(18, 8), "big")
    return AudioHeader("FLAC", bits & (1 << 36) - 1, bits >> 44, (bits >> 41 & 7) + 1)


def _probe_ogg(file: FilePrefix) -> AudioHeader:
    """The length stands on the last page, where libsndfile finds it."""
    file.require_whole()
    import soundfile

    try:
        info = soundfile.info(BytesIO(file.data))
    except soundfile.SoundFileError as error:
        raise HeaderError(f"corrupt or truncated: {error_text(error)}") from error
    return AudioHeader("OGG", info.frames, info.samplerate, info.channels)


def error_text(error: Exception) -> str:
    """The words of libsndfile, without the address of our buffer."""
    return str(getattr(error, "error_string", None) or error)


_PROBES: Final[dict[str, Callable[[FilePrefix], AudioHeader]]] = {
    "WAV": _probe_wav,
    "FLAC": _probe_flac,
    "OGG": _probe_ogg,
}
