"""Default dummy data: the largest items the layout knows, repeated, padded with text."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle, islice
from typing import TYPE_CHECKING

from PIL import Image

from registry.inputs import DummyData
from registry.media import MediaInfo, MediaItem

if TYPE_CHECKING:
    from registry.family import ModelFamily


def default_dummy_data(family: ModelFamily, seq_len: int, mm_counts: Mapping[str, int]) -> DummyData:
    """Items of the sizes with the most features and with the most bytes; text up to `seq_len` tokens."""
    items: list[MediaItem] = []
    ids: list[int] = []
    length = 0
    for modality, count in mm_counts.items():
        for info in islice(cycle(largest_items(family, modality)), count):
            items.append(_blank_item(info))
            ids.append(family.placeholder_token_id(modality))
            length += family.layout(info).length
    text = max(seq_len - length, 1)
    return DummyData([*ids, *[family.text_token_id] * text], items)


def largest_items(family: ModelFamily, modality: str) -> list[MediaInfo]:
    """The sizes with the most feature tokens and with the most tensor bytes; one if they are the same."""
    return list(
        dict.fromkeys((family.find_largest(modality, "num_tokens"), family.find_largest(modality, "num_bytes")))
    )


def _blank_item(info: MediaInfo) -> MediaItem:
    height, width = info.size
    return MediaItem(info, Image.new("RGB", (width, height), (127, 127, 127)))
