"""Checkpoints for `diptych check`, and how its report is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.checkpoints import make_llava_checkpoint, write_json

PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
STAGES = [
    "checkpoint", "hooks", "layout and mapper", "input processor", "transformers' processor", "maximum tokens",
    "dummy data", "executor model", "features", "forward", "fingerprint",
]  # fmt: skip
Report = dict[str, Any]


def make_checkpoint(path: Path, processor: str, **parameters: Any) -> Path:
    """A tiny checkpoint whose processor is told what those of real ones are told."""
    make_llava_checkpoint(path, **parameters)
    said = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    write_json(path / "processor_config.json", {"processor_class": processor, **said})
    return path


def renamed(checkpoint: Path, path: Path) -> Path:
    """The checkpoint under an architecture that is nobody's, without weights."""
    shutil.copytree(checkpoint, path)
    (path / "model.safetensors").unlink()
    config = json.loads((path / "config.json").read_text())
    write_json(path / "config.json", {**config, "architectures": ["OwnForImage2Seq"]})
    return path


def stage(report: Report, name: str) -> Report:
    return next(stage for stage in report["stages"] if stage["name"] == name)


def failed(report: Report) -> list[str]:
    return [stage["name"] for stage in report["stages"] if stage.get("ok") is False]


def only_failure(report: Report, name: str) -> tuple[str, str, str, str]:
    """(hook, item, expected, actual) of the first failure of the one stage that failed."""
    assert failed(report) == [name], report
    return first_failure(report, name)


def first_failure(report: Report, name: str) -> tuple[str, str, str, str]:
    failure = stage(report, name)["failures"][0]
    return failure["hook"], failure["item"], failure["expected"], failure["actual"]
