"""A small made-up family: a grid of features with separators, for tests of what the registry does with hooks."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from registry import (
    INPUT_REGISTRY,
    MULTIMODAL_REGISTRY,
    InputContext,
    ItemLayout,
    MediaInfo,
    MediaItem,
    Run,
    SupportsMultiModal,
    TensorSpec,
)
from registry.family import ModelFamily

PLACEHOLDERS = {"image": 3, "video": 8, "audio": 9}
START, ROW_END = 6, 7
CELL = 10
LEFT_OUT = object()


class Toy(SupportsMultiModal):
    """To be subclassed: hooks belong to exactly one class."""

    @classmethod
    def placeholder_token_id(cls, ctx: InputContext, modality: str) -> int:
        return PLACEHOLDERS[modality]


def grid(info: MediaInfo) -> tuple[int, int]:
    """Rows and columns of cells."""
    height, width = info.size
    return -(-height // CELL), -(-width // CELL)


def layout(ctx: InputContext, media: MediaInfo) -> ItemLayout:
    """A start token, then each row's features and its end."""
    rows, columns = grid(media)
    placeholder = PLACEHOLDERS[media.modality]
    return ItemLayout(
        replacement=(Run(START, 1, False), *[Run(placeholder, columns), Run(ROW_END, 1, False)] * rows),
        tensors={"pixels": TensorSpec("uint8", (*media.size, 3))},
        constants={"grid": np.array([rows, columns], dtype=np.int64)},
    )


def map_item(ctx: InputContext, item: MediaItem) -> dict[str, np.ndarray]:
    return {"pixels": np.asarray(item.data), "grid": np.array(grid(item.info), dtype=np.int64)}


def make_class(**hooks: Any) -> type[Toy]:
    """A family with these hooks for images: layout, mapper, max_tokens, dummy, processor; None: registered empty."""
    decorators = {
        "layout": MULTIMODAL_REGISTRY.register_image_layout,
        "mapper": MULTIMODAL_REGISTRY.register_image_input_mapper,
        "max_tokens": MULTIMODAL_REGISTRY.register_max_image_tokens,
        "dummy": INPUT_REGISTRY.register_dummy_data,
        "processor": INPUT_REGISTRY.register_input_processor,
    }
    cls = type("Toy", (Toy,), {})
    for name, hook in hooks.items():
        decorators[name](hook)(cls)
    return cls


def make_class_of(modality: str, **hooks: Any) -> type[Toy]:
    """A family with these hooks for one modality: layout, mapper, max_tokens."""
    cls = type("Toy", (Toy,), {})
    register = {
        "layout": MULTIMODAL_REGISTRY.register_item_layout,
        "mapper": MULTIMODAL_REGISTRY.register_input_mapper,
        "max_tokens": MULTIMODAL_REGISTRY.register_max_multimodal_tokens,
    }
    for name, hook in hooks.items():
        register[name](modality, hook)(cls)
    return cls


def make_family(ctx: InputContext, **hooks: Any) -> ModelFamily:
    """A family with the layout and mapper above, unless `hooks` say otherwise; LEFT_OUT leaves one out."""
    merged = {"layout": layout, "mapper": map_item, **hooks}
    return ModelFamily(make_class(**{name: hook for name, hook in merged.items() if hook is not LEFT_OUT}), ctx)


def image(height: int, width: int) -> MediaItem:
    return MediaItem(MediaInfo.image(height, width), Image.new("RGB", (width, height), (1, 2, 3)))
