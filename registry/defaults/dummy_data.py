"""Default dummy data: the largest items the layout knows, repeated, padded with text."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle, islice
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from registry.inputs import DummyData
from registry.media import MediaInfo, MediaItem

if TYPE_CHECKING:
    from registry.family import ModelFamily


def default_dummy_data(family: ModelFamily, seq_len: int, mm_counts: Mapping[str, int]) -> DummyData:
    """Items with the most features and with the most bytes; text up to `seq_len` tokens."""
    items: list[MediaItem] = []
    ids: list[int] = []
    length = 0
    for modality, count in mm_counts.items():
        for info in islice(cycle(largest_items(family, modality)), count):
            items.append(blank_item(info))
            ids.append(family.placeholder_token_id(modality))
            length += family.layout(info).length
    text = max(seq_len - length, 1)
    return DummyData([*ids, *[family.text_token_id] * text], items)


def largest_items(family: ModelFamily, modality: str) -> list[MediaInfo]:
    """The facts with the most feature tokens and with the most tensor bytes; one if they are the same."""
    return list(
        dict.fromkeys((family.find_largest(modality, "num_tokens"), family.find_largest(modality, "num_bytes")))
    )


def blank_item(info: MediaInfo) -> MediaItem:
    """An item of these facts: grey pictures or silence."""
    if info.modality == "audio":
        return MediaItem(info, np.zeros(info.num_samples or 0, dtype=np.float32))
    height, width = info.size
    picture = Image.new("RGB", (width, height), (127, 127, 127))
    return MediaItem(info, [picture] * (info.num_frames or 1) if info.modality == "video" else picture)
