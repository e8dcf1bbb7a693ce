"""Fixtures of the registry's tests: checkpoints, and families bound to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from registry import InputContext, MediaLimits
from registry.families import bind_family
from registry.family import ModelFamily
from tests.checkpoints import Checkpoints, make_llava_checkpoint, processor_config, write_json
from tests.plugins.checkpoints import make_qwen2_audio, make_video_llava

MakeFamily = Callable[..., ModelFamily]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def ctx(checkpoints: Checkpoints) -> InputContext:
    """The context of a CLIP checkpoint, for families made in tests."""
    return InputContext.from_checkpoint(checkpoints(), MediaLimits({"image": 4}))


@pytest.fixture(scope="session")
def family(ctx: InputContext) -> ModelFamily:
    """LLaVA-1.5 on the CLIP checkpoint."""
    return bind_family(ctx)


@pytest.fixture
def changed_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """A fresh checkpoint whose image processor has other settings than usual."""

    def make(processor: str = "clip", image_size: int = 56, **changes: Any) -> Path:
        path = make_llava_checkpoint(tmp_path / "changed", image_size=image_size)
        write_json(path / "preprocessor_config.json", processor_config(processor, image_size, **changes))
        return path

    return make


@pytest.fixture(scope="session")
def audio_ctx(tmp_path_factory) -> InputContext:
    return InputContext.from_checkpoint(make_qwen2_audio(tmp_path_factory.mktemp("audio")), MediaLimits({"audio": 2}))


@pytest.fixture(scope="session")
def video_ctx(tmp_path_factory) -> InputContext:
    return InputContext.from_checkpoint(make_video_llava(tmp_path_factory.mktemp("video")), MediaLimits({"video": 2}))
