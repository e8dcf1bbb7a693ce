"""Default input mappers: the checkpoint's own transformers processor, on numpy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from registry.context import InputContext
from registry.errors import MissingHookError
from registry.media import MediaItem


def map_image(ctx: InputContext, item: MediaItem) -> Mapping[str, np.ndarray]:
    """One image through the checkpoint's PIL image processor; every array keeps its leading batch axis."""
    return dict(ctx.image_processor(images=[item.data], return_tensors="np"))


def default_input_mapper(ctx: InputContext, item: MediaItem) -> Mapping[str, np.ndarray]:
    """The modality's default mapper; MissingHookError where a modality has none."""
    if item.modality == "image":
        return map_image(ctx, item)
    raise MissingHookError(
        f"{ctx.architecture}: there is no default input mapper for modality {item.modality!r}; register one"
    )
