"""From a file's beginning to the item's facts: size, frames after sampling, samples after resampling."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final

from diptych.service.errors import InvalidInputError, LimitExceededError, UnimplementedError
from preprocess_service.media.header_audio import AUDIO_FORMATS, probe_audio
from preprocess_service.media.header_video import VideoHeader, probe_video
from preprocess_service.media.headers import HeaderError, TruncatedHeader, probe_image
from preprocess_service.requests import FrameChoice, MediaHeader
from registry import InputContext, MediaInfo
from registry.frames import FrameSampling

STAGE: Final = "probe"
MAX_DECODED_PIXELS: Final = 1 << 34
"""Pixels of all frames of a video: each is decoded to get at the next, whether it counts or not."""
EXTRAS: Final = {"MP4": "video", **dict.fromkeys(AUDIO_FORMATS, "audio")}
"""Format -> the extra that decodes it."""
PACKAGES: Final = {"video": ("av",), "audio": ("soundfile", "soxr")}


@dataclass(frozen=True, slots=True)
class Probed:
    """An item's facts, its file's format, and of a video which frames count."""

    info: MediaInfo
    file_format: str
    frames: FrameChoice | None = None


class Prober:
    """Reads headers for one checkpoint: its sampling of frames, its sampling rate."""

    def __init__(self, ctx: InputContext) -> None:
        self._ctx = ctx

    def probe(self, modality: str, source: bytes | MediaHeader, index: int) -> Probed:
        """The facts of item `index`; INVALID_ARGUMENT where the header does not give them."""
        prefix, total = (source.prefix, source.total_bytes) if isinstance(source, MediaHeader) else (source, None)
        read = {"image": self._image, "video": self._video, "audio": self._audio}[modality]
        try:
            return read(prefix, total, index)
        except TruncatedHeader as error:
            raise InvalidInputError(
                f"item {index}: {error}", stage=STAGE, item=index, bytes_needed=error.bytes_needed
            ) from error
        except HeaderError as error:
            raise InvalidInputError(f"item {index}: {error}", stage=STAGE, item=index) from error

    def _image(self, prefix: bytes, total: int | None, index: int) -> Probed:
        header = probe_image(prefix, total)
        return Probed(MediaInfo.image(header.height, header.width), header.format)

    def _video(self, prefix: bytes, total: int | None, index: int) -> Probed:
        header = probe_video(prefix, total)
        require_extra(header.format, index)
        _check_work(header, index)
        chosen = FrameSampling.of(self._ctx).indices(header.num_frames, header.seconds)
        info = MediaInfo.video(header.height, header.width, len(chosen), len(chosen) / header.seconds)
        return Probed(info, header.format, FrameChoice(chosen, header.rotation))

    def _audio(self, prefix: bytes, total: int | None, index: int) -> Probed:
        require_extra("OGG", index)
        header = probe_audio(prefix, total)
        rate = self._ctx.sampling_rate
        return Probed(MediaInfo.audio(header.num_samples_at(rate), rate), header.format)


def require_extra(file_format: str, index: int) -> None:
    """UNIMPLEMENTED naming the extra if the packages that decode a format are not installed."""
    extra = EXTRAS.get(file_format)
    missing = [name for name in PACKAGES.get(extra or "", ()) if find_spec(name) is None]
    if missing:
        raise UnimplementedError(
            f"item {index}: {extra} files need {' and '.join(missing)}, which the extra [{extra}] installs: "
            f"pip install 'diptych[{extra}]'",
            stage=STAGE,
            item=index,
            extra=extra,
        )


def _check_work(header: VideoHeader, index: int) -> None:
    if (pixels := header.num_frames * header.height * header.width) > MAX_DECODED_PIXELS:
        raise LimitExceededError(
            f"item {index}: all {header.num_frames} frames of the video have {pixels} pixels; at most "
            f"{MAX_DECODED_PIXELS} are decoded",
            stage=STAGE,
            item=index,
            limit=MAX_DECODED_PIXELS,
            actual=pixels,
        )
