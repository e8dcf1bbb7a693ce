"""Limits on what one request's media may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from registry.errors import MediaSizeError, TooManyItemsError
from registry.media import MediaInfo


@dataclass(frozen=True)
class MediaLimits:
    """Limits on one request's media.

    `max_items_per_prompt` by modality, 1 where none is given; `max_image_side` in pixels and
    `max_image_pixels` (height times width) hold for pictures and for every frame; `max_video_frames` counts
    frames after sampling, `max_video_pixels` all their pixels together; `max_video_seconds` and
    `max_audio_seconds` bound the duration.
    """

    max_items_per_prompt: Mapping[str, int] = field(default_factory=dict)
    max_image_side: int = 8192
    max_image_pixels: int = 64 * 1024 * 1024
    max_video_frames: int = 32
    max_video_pixels: int = 256 * 1024 * 1024
    max_video_seconds: float = 600.0
    max_audio_seconds: float = 300.0

    def max_items(self, modality: str) -> int:
        """Items of `modality` that one prompt may have."""
        return self.max_items_per_prompt.get(modality, 1)

    def max_samples(self, sample_rate: int) -> int:
        """Samples that one audio item may have at `sample_rate` Hz."""
        return int(self.max_audio_seconds * sample_rate)

    def check_counts(self, counts: Mapping[str, int]) -> None:
        """TooManyItemsError naming both numbers for the first modality above its limit."""
        for modality, count in counts.items():
            if count > (limit := self.max_items(modality)):
                raise TooManyItemsError(
                    f"the prompt has {count} {modality} items; at most {limit} are allowed "
                    f"(--limit-mm-per-prompt {modality}={limit})",
                    limit=limit,
                    actual=count,
                )

    def check_size(self, info: MediaInfo, item_index: int | None = None) -> None:
        """MediaSizeError naming both numbers if an item is larger or longer than a limit allows."""
        if info.height is not None and info.width is not None:
            self._check_pixels(info, item_index)
        if info.num_frames is not None:
            self._check_frames(info, info.num_frames, item_index)
        if info.num_samples is not None and info.sample_rate is not None:
            limit = self.max_samples(info.sample_rate)
            what = f"the audio has {info.num_samples} samples at {info.sample_rate} Hz; at most {{}} are allowed"
            hint = f" ({self.max_audio_seconds:g} s, --max-audio-seconds)"
            _check(info.num_samples, limit, what + hint, item_index)

    def _check_pixels(self, info: MediaInfo, item_index: int | None) -> None:
        (height, width), what = info.size, "a frame" if info.modality == "video" else "the image"
        longer = f"{what} is {height}x{width} pixels; its longer side may have at most {{}}"
        _check(max(height, width), self.max_image_side, longer, item_index)
        pixels = height * width
        _check(
            pixels, self.max_image_pixels, f"{what} has {pixels} pixels ({height}x{width}); at most {{}} are allowed",
            item_index,
        )  # fmt: skip

    def _check_frames(self, info: MediaInfo, num_frames: int, item_index: int | None) -> None:
        frames = f"the video has {num_frames} frames after sampling; at most {{}} are allowed (--max-video-frames)"
        _check(num_frames, self.max_video_frames, frames, item_index)
        if info.height is not None and info.width is not None:
            pixels = num_frames * info.height * info.width
            whole = f"the sampled frames have {pixels} pixels; at most {{}} are allowed (--max-video-pixels)"
            _check(pixels, self.max_video_pixels, whole, item_index)
        if info.frame_rate:
            seconds = num_frames / info.frame_rate
            if seconds > self.max_video_seconds:
                raise MediaSizeError(
                    f"the video lasts {seconds:.3g} s; at most {self.max_video_seconds:g} s are allowed "
                    "(--max-video-seconds)",
                    item_index=item_index,
                    limit=int(self.max_video_seconds),
                    actual=int(seconds),
                )


def _check(actual: int, limit: int, message: str, item_index: int | None) -> None:
    if actual > limit:
        raise MediaSizeError(message.format(limit), item_index=item_index, limit=limit, actual=actual)
