"""Default input mappers: the checkpoint's own transformers processors, on numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from registry.context import InputContext
from registry.media import MediaInfo, MediaItem

Mapper = Callable[[InputContext, MediaItem], Mapping[str, np.ndarray]]
FRAMES_SUFFIX: Final = "_videos"
"""What the keywords of frames have behind those of pictures: a keyword belongs to one modality."""


def map_image(ctx: InputContext, item: MediaItem) -> Mapping[str, np.ndarray]:
    """One image through the checkpoint's PIL image processor; every array keeps its leading batch axis."""
    return dict(ctx.image_processor(images=[item.data], return_tensors="np"))


def map_audio(ctx: InputContext, item: MediaItem) -> Mapping[str, np.ndarray]:
    """Samples through the checkpoint's feature extractor; every array keeps its leading batch axis."""
    extractor = ctx.feature_extractor
    # Said twice because Whisper's extractor scales its mask down to frames only if the call asks for it.
    mask = {"return_attention_mask": True} if getattr(extractor, "return_attention_mask", False) else {}
    return dict(extractor(item.data, sampling_rate=item.info.sample_rate, return_tensors="np", **mask))


def map_frames(ctx: InputContext, item: MediaItem, map_picture: Mapper) -> Mapping[str, np.ndarray]:
    """Every frame through the family's image mapper, stacked: `pixel_values` becomes `pixel_values_videos`."""
    height, width = item.info.size
    mapped = [map_picture(ctx, MediaItem(MediaInfo.image(height, width), frame)) for frame in item.data]
    drops_batch_axis = map_picture is map_image
    return {
        name + FRAMES_SUFFIX: np.stack([arrays[name][0] if drops_batch_axis else arrays[name] for arrays in mapped])
        for name in mapped[0]
    }


def default_input_mapper(ctx: InputContext, item: MediaItem, image_mapper: Mapper | None) -> Mapping[str, np.ndarray]:
    """The modality's default mapper; frames go through `image_mapper`, or the default one for images."""
    if item.modality == "video":
        return map_frames(ctx, item, image_mapper or map_image)
    return map_audio(ctx, item) if item.modality == "audio" else map_image(ctx, item)
