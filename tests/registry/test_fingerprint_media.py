"""The fingerprint of what comes with this repository and of videos and audio: golden vectors, and named differences."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from registry import InputContext, ItemLayout, MediaInfo, Run, TensorSpec
from registry.errors import UnusableMediaError
from registry.families import open_family
from registry.family import ModelFamily
from registry.fingerprint import fingerprint
from tests.checkpoints import write_json
from tests.plugins import qwen2_audio, video_llava
from tests.plugins.checkpoints import make_qwen2_audio
from tests.registry.synthetic import make_class_of

GOLDEN = {
    "llava": {
        "architecture": "452a515b8c9a93d0", "contract version": "6b86b273ff34fce1",
        "wire dtypes": "c91718cb895dc757", "item layout": "acfac078b959bd1e", "input mapper": "4d602aca13924395",
    },
    "llava-next": {
        "architecture": "191ce9c8cc083a84", "contract version": "6b86b273ff34fce1",
        "wire dtypes": "c91718cb895dc757", "item layout": "7a4559efea1f81af", "input mapper": "22c098e6103dbf7d",
    },
    "qwen2-audio": {
        "architecture": "a6e53ab537160d20", "contract version": "6b86b273ff34fce1",
        "wire dtypes": "c91718cb895dc757", "item layout": "186b3c22277e4d92", "input mapper": "74234e98afe7498f",
        "audio layout": "710c9c9360c82122", "audio mapper": "c74435d6e85f5fbc",
    },
    "video-llava": {
        "architecture": "bc300ddb839b5f38", "contract version": "6b86b273ff34fce1",
        "wire dtypes": "c91718cb895dc757", "item layout": "acfac078b959bd1e", "input mapper": "4d602aca13924395",
        "video layout": "e9cc3fd6e58084d5", "video mapper": "07ca5c10d23d4dc0",
    },
}  # fmt: skip
"""The first 8 bytes of every part but the tokenizer's, which is trained anew for each test run.

They change only where counts, pixels, shapes or the contract do.
"""
GOLDEN_PROBES = [1.2679, 1.3020, 1.1567, -0.6965, -0.3813, 1.2692, -0.6803, -0.6803]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_vectors(checkpoints, audio_ctx, video_ctx, name: str) -> None:
    family = {
        "llava": lambda: open_family(checkpoints()),
        "llava-next": lambda: open_family(checkpoints(pinpoints=[[56, 112], [112, 56]])),
        "qwen2-audio": lambda: ModelFamily(qwen2_audio.Qwen2AudioForConditionalGeneration, audio_ctx),
        "video-llava": lambda: ModelFamily(video_llava.VideoLlavaForConditionalGeneration, video_ctx),
    }[name]()
    found = fingerprint(family)
    parts = {part: digest.hex()[:16] for part, digest in found.parts.items() if part != "tokenizer"}
    assert parts == GOLDEN[name]
    assert found.probes[::8] == pytest.approx(GOLDEN_PROBES if name == "qwen2-audio" else [], abs=1e-3)


def test_videos_and_audio_have_parts_of_their_own(audio_ctx, video_ctx) -> None:
    audio = fingerprint(ModelFamily(qwen2_audio.Qwen2AudioForConditionalGeneration, audio_ctx))
    assert {"audio layout", "audio mapper"} <= set(audio.parts)
    assert len(audio.probes) == 64
    both = fingerprint(ModelFamily(video_llava.VideoLlavaForConditionalGeneration, video_ctx))
    assert {"video layout", "video mapper", "item layout", "input mapper"} <= set(both.parts)
    assert both.probes == ()
    again = ModelFamily(video_llava.VideoLlavaForConditionalGeneration, replace(video_ctx))
    assert fingerprint(again) == both


def change_extractor(path, **changes: Any) -> None:
    file = path / "preprocessor_config.json"
    write_json(file, {**json.loads(file.read_text("utf-8")), **changes})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"padding_value": 0.0}, []),
        ({"hop_length": 200}, ["audio layout", "audio mapper", "float mapper output"]),
        ({"feature_size": 20}, ["audio layout", "audio mapper", "float mapper output"]),
        ({"n_fft": 512}, ["float mapper output"]),
        ({"chunk_length": 2}, ["audio layout", "audio mapper", "float mapper output"]),
    ],
    ids=str,
)
def test_differences_of_audio_are_named(audio_ctx, tmp_path, changes, expected: list[str]) -> None:
    usual = fingerprint(ModelFamily(qwen2_audio.Qwen2AudioForConditionalGeneration, audio_ctx))
    change_extractor(make_qwen2_audio(tmp_path), **changes)
    other = InputContext.from_checkpoint(tmp_path)
    found = fingerprint(ModelFamily(qwen2_audio.Qwen2AudioForConditionalGeneration, other))
    assert found.differences(usual) == expected


def test_what_a_family_refuses_is_part_of_the_fingerprint(ctx) -> None:
    def make(shortest: int):
        def layout(given, media: MediaInfo) -> ItemLayout:
            if media.num_samples < shortest:
                raise UnusableMediaError("too short")
            return ItemLayout((Run(9, 1),), {"x": TensorSpec("uint8", (1,))})

        cls = make_class_of("audio", layout=layout, mapper=lambda *_: {"x": np.zeros(1, np.uint8)})
        return fingerprint(ModelFamily(cls, ctx))

    assert make(10).differences(make(20)) == []
    assert make(10).differences(make(500)) == ["audio layout"]
    assert make(10**7).differences(make(500)) == ["audio layout", "audio mapper"]
