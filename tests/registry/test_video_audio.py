"""Videos and audio in the registry: defaults, searches, limits, sampling of frames, processors by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from registry import (
    INPUT_REGISTRY,
    MULTIMODAL_REGISTRY,
    DummyData,
    ItemLayout,
    MediaInfo,
    MediaItem,
    MediaLimits,
    PlaceholderRange,
    ProcessorInputs,
    Run,
    TensorSpec,
)
from registry.errors import CheckpointError, InvalidHookError, MediaSizeError, UnusableMediaError
from registry.family import ModelFamily
from registry.frames import FrameSampling
from tests.plugins import qwen2_audio, video_llava
from tests.registry.synthetic import make_class_of

RATE = 16000


def video(height: int, width: int, num_frames: int) -> MediaItem:
    frames = [Image.new("RGB", (width, height), (20 * number, 3, 200)) for number in range(num_frames)]
    return MediaItem(MediaInfo.video(height, width, num_frames), frames)


# --- default mappers ------------------------------------------------------------------------------


@pytest.mark.parametrize("hooks", [{}, {"mapper": None}], ids=["left out", "empty"])
def test_frames_go_through_the_checkpoints_image_processor(ctx, hooks) -> None:
    spec = TensorSpec("float32", (3, 3, 56, 56))
    cls = make_class_of("video", layout=lambda *_: ItemLayout((Run(8, 5),), {"pixel_values_videos": spec}), **hooks)
    item = video(40, 50, 3)
    mapped = ModelFamily(cls, ctx).map_item(item)["pixel_values_videos"]
    expected = ctx.image_processor(images=item.data, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(mapped, np.stack(expected))


def test_frames_go_through_the_familys_image_mapper(ctx) -> None:
    spec = TensorSpec("uint8", (2, 4, 5, 3))
    cls = make_class_of("video", layout=lambda *_: ItemLayout((Run(8, 5),), {"pixels_videos": spec}))
    seen = []

    def map_image(given, item: MediaItem):
        seen.append(item.info)
        return {"pixels": np.asarray(item.data)}

    MULTIMODAL_REGISTRY.register_image_input_mapper(map_image)(cls)
    MULTIMODAL_REGISTRY.register_image_layout(lambda *_: ItemLayout((Run(3, 1),), {}))(cls)
    item = video(4, 5, 2)
    mapped = ModelFamily(cls, ctx).map_item(item)["pixels_videos"]
    np.testing.assert_array_equal(mapped, np.stack([np.asarray(frame) for frame in item.data]))
    assert seen == [MediaInfo.image(4, 5)] * 2


def test_samples_go_through_the_checkpoints_feature_extractor(audio_ctx) -> None:
    family = ModelFamily(qwen2_audio.Qwen2AudioForConditionalGeneration, audio_ctx)
    samples = np.random.default_rng(0).normal(0, 0.1, 5000).astype(np.float32)
    mapped = family.map_item(MediaItem(MediaInfo.audio(5000, RATE), samples))
    expected = audio_ctx.feature_extractor(samples, sampling_rate=RATE, return_tensors="np")["input_features"][0]
    np.testing.assert_array_equal(mapped["input_features"], expected)
    assert list(mapped) == ["input_features"]


def test_a_large_constant_that_differs_is_summarised(audio_ctx, monkeypatch) -> None:
    family = ModelFamily(qwen2_audio.Qwen2AudioForConditionalGeneration, audio_ctx)
    monkeypatch.setattr(audio_ctx.feature_extractor, "hop_length", 100)
    with pytest.raises(InvalidHookError, match="attention_mask differs from the layout's") as caught:
        family.map_item(MediaItem(MediaInfo.audio(5000, RATE), np.zeros(5000, np.float32)))
    assert len(str(caught.value)) < 500


# --- maxima and dummy data ------------------------------------------------------------------------

VIDEO_COUNTS = {
    "frames by area": lambda h, w, f: f * max(h // 14, 1) * max(w // 14, 1),
    "pairs of frames": lambda h, w, f: -(-f // 2) * min(h // 7 + 1, 5) * min(w // 7 + 1, 5),
    "fewer with more frames": lambda h, w, f: max(40 - 3 * f, 1) * min(h, 9),
    "a peak between": lambda h, w, f: 1000 - 50 * abs(f - 5) - abs(h - 33) - abs(w - 21),
}


@pytest.mark.parametrize("name", VIDEO_COUNTS)
@pytest.mark.parametrize("limits", [(40, 1600, 9, 10**6), (40, 1000, 6, 3000)], ids=str)
def test_the_search_finds_the_largest_video(ctx, name: str, limits) -> None:
    count, (side, pixels, frames, all_pixels) = VIDEO_COUNTS[name], limits
    small = replace(
        ctx,
        limits=MediaLimits({}, side, pixels, frames, all_pixels),
        processor_config={"video_processor": {"fps": 2}},
    )
    family = ModelFamily(
        make_class_of(
            "video", layout=lambda _, m: ItemLayout((Run(8, count(*m.size, m.num_frames)),), {}), max_tokens=None
        ),
        small,
    )
    sizes = [(h, w, f) for h in range(1, side + 1) for w in range(1, side + 1) for f in range(1, frames + 1)]
    allowed = [(h, w, f) for h, w, f in sizes if h * w <= pixels and h * w * f <= all_pixels]
    assert family.max_tokens("video") == max(count(*size) for size in allowed)
    small.limits.check_size(family.find_largest("video", "num_tokens"))


def test_no_more_frames_than_are_sampled(ctx) -> None:
    fixed = replace(ctx, processor_config={"video_processor": {"num_frames": 4}})
    cls = make_class_of("video", layout=lambda _, media: ItemLayout((Run(8, media.num_frames),), {}))
    assert ModelFamily(cls, fixed).max_tokens("video") == 4
    assert ModelFamily(cls, replace(ctx, processor_config={})).max_tokens("video") == 8


AUDIO_COUNTS = {
    "per 160 samples": lambda n: -(-n // 160),
    "up to a second": lambda n: min(-(-n // 320), 50),
    "chunks": lambda n: -(-n // 1000) * 30 + n // 777,
    "a peak between": lambda n: 40_000 - abs(n - 23_456),
}


@pytest.mark.parametrize("name", AUDIO_COUNTS)
def test_the_search_finds_the_largest_audio(ctx, name: str) -> None:
    count, small = AUDIO_COUNTS[name], replace(ctx, limits=MediaLimits(max_audio_seconds=2.0))
    family = ModelFamily(
        make_class_of("audio", layout=lambda _, media: ItemLayout((Run(9, count(media.num_samples)),), {})), small
    )
    assert family.max_tokens("audio") == max(count(samples) for samples in range(1, 2 * RATE + 1))


def test_what_a_family_refuses_is_no_candidate(ctx) -> None:
    def layout(given, media: MediaInfo) -> ItemLayout:
        if media.num_samples % 2:
            raise UnusableMediaError("odd")
        return ItemLayout((Run(9, media.num_samples),), {})

    limits = MediaLimits(max_audio_seconds=999 / RATE)
    family = ModelFamily(make_class_of("audio", layout=layout), replace(ctx, limits=limits))
    assert family.max_tokens("audio") == 998
    never = make_class_of("audio", layout=lambda *_: layout(None, MediaInfo.audio(1, RATE)))
    with pytest.raises(InvalidHookError, match="the layout takes no audio within the limits"):
        ModelFamily(never, ctx).max_tokens("audio")


@pytest.mark.parametrize(
    ("modality", "number"), [("video", 64), ("audio", 64), ("video", lambda ctx: 64), ("audio", lambda ctx: 64)]
)
def test_maximum_by_hand(ctx, modality: str, number) -> None:
    cls = make_class_of(modality, layout=lambda *_: ItemLayout((Run(8, 4),), {}), max_tokens=number)
    assert ModelFamily(cls, ctx).max_tokens(modality) == 64


def test_dummy_data_of_both(audio_ctx, video_ctx) -> None:
    for ctx, cls, modality in (
        (audio_ctx, qwen2_audio.Qwen2AudioForConditionalGeneration, "audio"),
        (video_ctx, video_llava.VideoLlavaForConditionalGeneration, "video"),
    ):
        family = ModelFamily(cls, ctx)
        inputs, items = family.dummy_data(150, {modality: 2})
        assert len(items) == 2
        assert [layout.num_tokens for layout in inputs.layouts] == [family.max_tokens(modality)] * 2
        for item, layout in zip(items, inputs.layouts, strict=True):
            assert {name: array.shape for name, array in family.map_item(item).items()} == {
                name: spec.shape for name, spec in layout.tensors.items()
            }


# --- sampling -------------------------------------------------------------------------------------


@given(st.integers(1, 5000), st.floats(0.01, 1000), st.integers(1, 64))
def test_frames_are_spread_evenly(total: int, seconds: float, wanted: int) -> None:
    indices = FrameSampling(num_frames=wanted).indices(total, seconds)
    assert len(indices) == min(wanted, total)
    assert indices[0] == 0
    assert indices[-1] < total
    gaps = [later - earlier for earlier, later in pairwise(indices)]
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert not gaps or min(gaps) >= 1


@pytest.mark.parametrize(
    ("config", "total", "seconds", "expected"),
    [
        ({}, 100, 10.0, 8),
        ({"video_processor": {"num_frames": 5}}, 100, 10.0, 5),
        ({"video_processor": {"num_frames": 5, "fps": 2}}, 100, 10.0, 5),
        ({"video_processor": {"fps": 2}}, 100, 10.0, 20),
        ({"video_processor": {"fps": 1.5}}, 100, 3.0, 4),
        ({"video_processor": {"fps": 2}}, 7, 10.0, 7),
        ({"video_processor": {"fps": 0.1}}, 7, 1.0, 1),
    ],
)
def test_how_many_frames(ctx, config, total: int, seconds: float, expected: int) -> None:
    assert FrameSampling.of(replace(ctx, processor_config=config)).count(total, seconds) == expected


@pytest.mark.parametrize("value", [0, -1, "two", True])
def test_sampling_that_makes_no_sense(ctx, value) -> None:
    with pytest.raises(CheckpointError, match=r"the video processor's num_frames of .*; it must be > 0"):
        FrameSampling.of(replace(ctx, processor_config={"video_processor": {"num_frames": value}}))


def test_the_file_of_the_video_processor_is_read(video_ctx) -> None:
    assert FrameSampling.of(video_ctx) == FrameSampling(num_frames=3)


@pytest.mark.parametrize(
    ("config", "rate"),
    [({}, 16000), ({"sampling_rate": 8000}, 8000), ({"feature_extractor": {"sampling_rate": 24000}}, 24000)],
)
def test_sampling_rate(ctx, config, rate: int) -> None:
    assert replace(ctx, processor_config=config).sampling_rate == rate


def test_a_sampling_rate_that_is_none(ctx) -> None:
    with pytest.raises(CheckpointError, match=r"the sampling_rate of .* is 'high'; it must be a number of Hz"):
        _ = replace(ctx, processor_config={"sampling_rate": "high"}).sampling_rate


def test_no_feature_extractor(ctx) -> None:
    broken = replace(ctx, model_dir=ctx.model_dir / "nowhere")
    with pytest.raises(CheckpointError, match="cannot make the feature extractor of"):
        _ = broken.feature_extractor


# --- limits ---------------------------------------------------------------------------------------

LIMITS = MediaLimits({}, 100, 3000, 4, 8000, 10.0, 2.0)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (MediaInfo.video(101, 5, 1), "a frame is 101x5 pixels; its longer side may have at most 100"),
        (MediaInfo.video(60, 51, 1), "a frame has 3060 pixels (60x51); at most 3000 are allowed"),
        (MediaInfo.video(9, 9, 5), "the video has 5 frames after sampling; at most 4 are allowed (--max-video-frames)"),
        (
            MediaInfo.video(50, 50, 4),
            "the sampled frames have 10000 pixels; at most 8000 are allowed (--max-video-pixels)",
        ),
        (MediaInfo.video(9, 9, 4, 0.2), "the video lasts 20 s; at most 10 s are allowed (--max-video-seconds)"),
        (
            MediaInfo.audio(32001, RATE),
            "the audio has 32001 samples at 16000 Hz; at most 32000 are allowed (2 s, --max-audio-seconds)",
        ),
    ],
    ids=str,
)
def test_too_large_or_too_long(info: MediaInfo, message: str) -> None:
    for allowed in (MediaInfo.video(100, 30, 2), MediaInfo.video(9, 9, 4, 0.4), MediaInfo.audio(32000, RATE)):
        LIMITS.check_size(allowed)
    with pytest.raises(MediaSizeError, match=f"^{re.escape(message)}$") as caught:
        LIMITS.check_size(info, 3)
    assert caught.value.item_index == 3


# --- processors by hand ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([], "Toy: the input processor gives 0 placeholder ranges for 1 items"),
        (
            [PlaceholderRange(2, 3)],
            "Toy: the input processor puts item 0 at tokens 2 to 5; it must lie between 0 and 3",
        ),
        (
            [PlaceholderRange(1, 0)],
            "Toy: the input processor puts item 0 at tokens 1 to 1; it must lie between 0 and 3",
        ),
    ],
)
def test_ranges_of_a_processor_by_hand(ctx, places, message: str) -> None:
    cls = make_class_of("audio", mapper=lambda *_: {}, max_tokens=4)
    INPUT_REGISTRY.register_dummy_data(lambda *_: DummyData([], []))(cls)
    INPUT_REGISTRY.register_input_processor(lambda _, inputs: ProcessorInputs([1, 9, 2], inputs.media, places))(cls)
    with pytest.raises(InvalidHookError, match=f"^{re.escape(message)}$"):
        ModelFamily(cls, ctx).process(ProcessorInputs([1, 9, 2], [MediaInfo.audio(5, RATE)]))


def test_ranges_of_two_items_must_not_overlap(ctx) -> None:
    cls = make_class_of("audio", mapper=lambda *_: {}, max_tokens=4)
    places = [PlaceholderRange(0, 2), PlaceholderRange(1, 2)]
    INPUT_REGISTRY.register_dummy_data(lambda *_: DummyData([], []))(cls)
    INPUT_REGISTRY.register_input_processor(lambda _, inputs: ProcessorInputs([1, 9, 2], inputs.media, places))(cls)
    with pytest.raises(InvalidHookError, match=r"puts item 1 at tokens 1 to 3; it must lie between 2 and 3$"):
        ModelFamily(cls, ctx).process(ProcessorInputs([9, 9], [MediaInfo.audio(5, RATE)] * 2))


def test_an_observed_layout(ctx) -> None:
    family = ModelFamily(make_class_of("audio", layout=lambda *_: ItemLayout((Run(9, 1),), {})), ctx)
    layout = family.observed_layout("audio", [6, 9, 9, 7, 9], {})
    assert layout.feature_mask.tolist() == [False, True, True, False, True]
    assert (layout.num_tokens, layout.token_ids) == (3, [6, 9, 9, 7, 9])
