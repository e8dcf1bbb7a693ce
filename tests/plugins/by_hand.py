"""LLaVA-1.5 without a layout: mapper, maximum, dummy data and processor by hand, as in older systems."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image

from registry import (
    INPUT_REGISTRY,
    MULTIMODAL_REGISTRY,
    DummyData,
    InputContext,
    MediaInfo,
    MediaItem,
    PlaceholderRange,
    ProcessorInputs,
    SupportsMultiModal,
)

NUM_FEATURES = 16


def map_image(ctx: InputContext, item: MediaItem) -> dict[str, np.ndarray]:
    return dict(ctx.image_processor(images=[item.data], return_tensors="np"))


def make_dummy_data(ctx: InputContext, seq_len: int, mm_counts: Mapping[str, int]) -> DummyData:
    count = mm_counts["image"]
    picture = MediaItem(MediaInfo.image(60, 60), Image.new("RGB", (60, 60)))
    return DummyData([3] * count + [5] * seq_len, [picture] * count)


def process(ctx: InputContext, inputs: ProcessorInputs) -> ProcessorInputs:
    ids: list[int] = []
    places = []
    for token in inputs.prompt_token_ids:
        if token == 3:
            places.append(PlaceholderRange(len(ids), NUM_FEATURES))
        ids += [token] * (NUM_FEATURES if token == 3 else 1)
    return ProcessorInputs(ids, inputs.media, places)


@MULTIMODAL_REGISTRY.register_image_input_mapper(map_image)
@MULTIMODAL_REGISTRY.register_max_image_tokens(2 * NUM_FEATURES)
@INPUT_REGISTRY.register_dummy_data(make_dummy_data)
@INPUT_REGISTRY.register_input_processor(process)
class ByHandForConditionalGeneration(SupportsMultiModal):
    executor_model = "tests.plugins.by_hand_model:ByHandModel"
