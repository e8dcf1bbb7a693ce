"""Media items and the facts their headers give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from registry.errors import UnknownModalityError

MODALITIES: Final = ("image", "video", "audio")


def check_modality(modality: str) -> str:
    """The modality itself, or UnknownModalityError listing those that exist."""
    if modality not in MODALITIES:
        raise UnknownModalityError(f"unknown modality {modality!r}; the modalities are {', '.join(MODALITIES)}")
    return modality


@dataclass(frozen=True, slots=True)
class MediaInfo:
    """What a media header says about one item; only the fields of its modality are set.

    `height` and `width` are pixels after EXIF rotation; `num_frames` counts frames after sampling and
    `frame_rate` is their rate per second; `num_samples` counts samples per channel after resampling to
    `sample_rate` Hz.
    """

    modality: str
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    frame_rate: float | None = None
    num_samples: int | None = None
    sample_rate: int | None = None

    @classmethod
    def image(cls, height: int, width: int) -> MediaInfo:
        """Facts of an image of `height` x `width` pixels."""
        return cls("image", height=height, width=width)

    @classmethod
    def video(cls, height: int, width: int, num_frames: int, frame_rate: float = 1.0) -> MediaInfo:
        """Facts of `num_frames` sampled frames of `height` x `width` pixels."""
        return cls("video", height=height, width=width, num_frames=num_frames, frame_rate=frame_rate)

    @classmethod
    def audio(cls, num_samples: int, sample_rate: int) -> MediaInfo:
        """Facts of `num_samples` samples at `sample_rate` Hz."""
        return cls("audio", num_samples=num_samples, sample_rate=sample_rate)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels; ValueError for audio."""
        if self.height is None or self.width is None:
            raise ValueError(f"{self.modality} has no height and width")
        return self.height, self.width


@dataclass(frozen=True, slots=True)
class MediaItem:
    """One decoded item, as an input mapper receives it.

    `data` is a `PIL.Image.Image` in mode RGB for images, a list of them for video, and a float32 array
    of shape [num_samples] for audio.
    """

    info: MediaInfo
    data: Any

    @property
    def modality(self) -> str:
        """The item's modality."""
        return self.info.modality
