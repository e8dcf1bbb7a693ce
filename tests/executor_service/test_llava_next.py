"""LLaVA-NeXT on the engine: pictures of several sizes in one prompt and one batch, token for token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, image_size_to_num_patches

from executor_service.engine.request import Request
from tests.checkpoints import make_llava_checkpoint
from tests.executor_service.conftest import Bench, boot_engine, load_reference, picture

PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
SIZES = [(60, 80), (200, 30), (112, 112), (40, 41), (33, 170)]


def mixed_requests(bench: Bench, count: int, **sampling: object) -> list[Request]:
    requests = []
    for number in range(count):
        pictures = [picture(7 * number + i, *SIZES[(number + i) % len(SIZES)]) for i in range(number % 4)]
        text = "look " * (number % 3) + " then ".join(["<image>"] * len(pictures)) + " what" * (number % 5) + "?"
        requests.append(bench.request(number, text, pictures, **{"max_tokens": 5 + number % 6, **sampling}))
    return requests


@pytest.mark.parametrize(
    ("variant", "budget"),
    [({}, 512), ({}, 23), ({"language": "mistral", "sliding_window": 40}, 64),
     ({"tower": "siglip", "select_strategy": "full", "layout": "old"}, 64)],
    ids=["clip-llama", "chunked", "mistral", "siglip-old"],
)  # fmt: skip
def test_tokens_equal_generate(tmp_path, variant: dict, budget: int) -> None:
    checkpoint = make_llava_checkpoint(tmp_path / "model", pinpoints=PINPOINTS, **variant)
    bench = Bench(checkpoint, boot_engine(checkpoint, max_num_batched_tokens=budget), load_reference(checkpoint))
    requests = mixed_requests(bench, 8)
    assert len({item.tensors["pixel_values"].shape[0] for request in requests for item in request.items}) > 1
    outputs = bench.run(requests)
    for request in requests:
        assert outputs[request.request_id] == bench.expected(request)


def test_preemption(tmp_path) -> None:
    checkpoint = make_llava_checkpoint(tmp_path / "model", pinpoints=PINPOINTS)
    booted = boot_engine(checkpoint, max_model_len=320, block_size=4, kv_cache_memory=82 * 2 * 2 * 4 * 2 * 16 * 8)
    bench = Bench(checkpoint, booted, load_reference(checkpoint))
    requests = mixed_requests(bench, 12, max_tokens=25)
    outputs = bench.run(requests)
    assert sum(request.num_preemptions for request in requests) > 0
    for request in requests:
        assert outputs[request.request_id] == bench.expected(request)


def test_pictures_are_packed_as_by_transformers(tmp_path) -> None:
    checkpoint = make_llava_checkpoint(tmp_path / "model", pinpoints=PINPOINTS)
    model: Any = boot_engine(checkpoint).engine.runner.model.hf.model
    vision = model.config.vision_config
    rng = np.random.default_rng(5)
    sizes = [*SIZES, *rng.integers(1, 400, (40, 2)).tolist()]
    counts = [image_size_to_num_patches(size, PINPOINTS, vision.image_size) for size in sizes]
    pictures = [torch.randn(count, (vision.image_size // vision.patch_size) ** 2, 8) for count in [*counts, 1]]
    options = {"vision_feature_select_strategy": "default", "image_newline": torch.randn(8)}
    packed, _ = model.pack_image_features(pictures, [*sizes, (5, 5)], **options)
    expected, _ = LlavaNextModel.pack_image_features(model, pictures, [*sizes, (5, 5)], **options)
    assert model.pack_image_features.__func__ is not LlavaNextModel.pack_image_features
    assert len(packed) == len(expected)
    for ours, theirs in zip(packed, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
