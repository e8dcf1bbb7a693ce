"""The fingerprint tells behaviours apart, and nothing else."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from registry import InputContext, ItemLayout, Run, TensorSpec
from registry.errors import CheckpointError
from registry.families import bind_family
from registry.fingerprint import Fingerprint, fingerprint
from tests.checkpoints import Checkpoints, make_llava_checkpoint, processor_config, write_json, write_tokenizer
from tests.registry.synthetic import make_family

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from registry import InputContext
from registry.families import bind_family
from registry.fingerprint import fingerprint
print(fingerprint(bind_family(InputContext.from_checkpoint(sys.argv[1]))).digest.hex())
"""


def fingerprint_of(path: Path) -> Fingerprint:
    return fingerprint(bind_family(InputContext.from_checkpoint(path)))


@pytest.fixture(scope="session")
def usual(checkpoints: Checkpoints) -> Fingerprint:
    return fingerprint_of(checkpoints())


def test_the_same_checkpoint_twice(checkpoints: Checkpoints, usual: Fingerprint) -> None:
    again = fingerprint_of(checkpoints())
    assert again == usual
    assert again.differences(usual) == []
    assert len(usual.digest) == 32


def test_the_same_checkpoint_in_another_process(checkpoints: Checkpoints, usual: Fingerprint) -> None:
    """Its strings hash otherwise."""
    environment = {"PYTHONHASHSEED": "1", "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, str(checkpoints())]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == usual.digest.hex()


@pytest.mark.parametrize(
    "parameters",
    [
        {"seed": 7}, {"language": "mistral"}, {"layout": "old"}, {"shards": 2}, {"max_positions": 512},
        {"feature_layer": [-2, -1]}, {"select_strategy": "full", "tower": "siglip"},
    ],
    ids=str,
)  # fmt: skip
def test_what_tokens_and_pixels_do_not_depend_on(checkpoints: Checkpoints, usual: Fingerprint, parameters) -> None:
    """A SigLIP tower that keeps all 16 patches counts as many as a CLIP tower that drops its class token."""
    assert fingerprint_of(checkpoints(**parameters)).differences(usual) == []


def set_processor(path: Path, **changes: Any) -> None:
    write_json(path / "preprocessor_config.json", processor_config("clip", 56, **changes))


def set_tokenizer(path: Path, change: Callable[[Any], None]) -> None:
    file = path / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    change(content)
    write_json(file, content)


def set_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text("utf-8"))
    write_json(path / "config.json", {**config, **changes})


CHANGES: dict[str, tuple[Any, list[str]]] = {
    "nothing": (lambda path: None, []),
    "normalisation": (lambda path: set_processor(path, image_mean=[0.5] * 3, rescale_factor=0.1), []),
    "fewer tokens": (lambda path: write_tokenizer(path, 300), ["tokenizer"]),
    "a merge less": (lambda path: set_tokenizer(path, lambda t: t["model"]["merges"].pop()), ["tokenizer"]),
    "a normalizer": (lambda path: set_tokenizer(path, lambda t: t.update(normalizer={"type": "NFC"})), ["tokenizer"]),
    "a flag": (lambda path: set_tokenizer(path, lambda t: t["added_tokens"][3].update(lstrip=True)), ["tokenizer"]),
    "another decoder": (lambda path: set_tokenizer(path, lambda t: t.update(decoder={"type": "Fuse"})), ["tokenizer"]),
    "another filter": (lambda path: set_processor(path, resample=2), ["input mapper"]),
    "another resize": (lambda path: set_processor(path, size={"shortest_edge": 60}), ["input mapper"]),
    "all features": (lambda path: set_config(path, vision_feature_select_strategy="full"), ["item layout"]),
    "another placeholder": (lambda path: set_config(path, image_token_index=9), ["item layout", "tokenizer"]),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_differences_are_named(tmp_path: Path, usual: Fingerprint, change: str) -> None:
    make_change, expected = CHANGES[change]
    make_change(make_llava_checkpoint(tmp_path))
    other = fingerprint_of(tmp_path)
    assert usual.differences(other) == other.differences(usual) == expected
    assert (usual.digest == other.digest) == (not expected)


def test_another_image_size_is_another_layout_and_other_pixels(checkpoints: Checkpoints, usual: Fingerprint) -> None:
    other = fingerprint_of(checkpoints(image_size=84))
    assert usual.differences(other) == ["input mapper", "item layout"]


def test_a_part_that_one_side_lacks_differs(usual: Fingerprint) -> None:
    fewer = replace(usual, parts={name: part for name, part in usual.parts.items() if name != "tokenizer"})
    assert usual.differences(fewer) == fewer.differences(usual) == ["tokenizer"]


def float_family(ctx: InputContext, scale: float = 1.0, constant: int = 0):
    """A float mapper, and a constant that only the layout knows."""
    return make_family(
        ctx,
        layout=lambda ctx, media: ItemLayout(
            (Run(3, 1),), {"x": TensorSpec("float32", (6, 5))}, {"c": np.array([constant])}
        ),
        mapper=lambda ctx, item: {"x": scale * np.asarray(item.data.resize((5, 6)), np.float32)[..., 0] / 255},
    )


def test_float_pixels_are_probed(ctx) -> None:
    found = fingerprint(float_family(ctx))
    assert len(found.probes) == 64
    assert len(set(found.probes)) > 20
    assert all(0 <= value <= 1 for value in found.probes)
    assert fingerprint(float_family(ctx)).differences(found) == []


def test_float_pixels_are_compared_with_a_tolerance(ctx) -> None:
    """The digest stays the same: last bits differ between library versions."""
    found = fingerprint(float_family(ctx))
    close, far = fingerprint(float_family(ctx, 1.0005)), fingerprint(float_family(ctx, 1.01))
    assert found.digest == close.digest == far.digest
    assert close.differences(found) == []
    assert far.differences(found) == ["float mapper output"]


@pytest.mark.parametrize(("change", "agrees"), [(0.9e-3, True), (-0.9e-3, True), (1.1e-3, False), (-1.1e-3, False)])
@pytest.mark.parametrize("place", [0, 63])
def test_one_probe_decides(ctx, place: int, change: float, agrees: bool) -> None:
    found = fingerprint(float_family(ctx))
    probes = list(found.probes)
    probes[place] += change
    assert found.differences(replace(found, probes=tuple(probes))) == ([] if agrees else ["float mapper output"])


def test_fewer_probes_differ(ctx) -> None:
    found = fingerprint(float_family(ctx))
    assert found.differences(replace(found, probes=found.probes[1:])) == ["float mapper output"]


def test_constants_are_part_of_the_layout(ctx) -> None:
    assert fingerprint(float_family(ctx)).differences(fingerprint(float_family(ctx, constant=1))) == ["item layout"]


class WithoutStart:
    """A tokenizer that encodes otherwise than its rules say, as a class of transformers' may."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)[1:]


def test_what_a_tokenizer_makes_of_texts_counts_beside_its_rules(ctx) -> None:
    other = float_family(replace(ctx, tokenizer=WithoutStart(ctx.tokenizer)))
    assert fingerprint(float_family(ctx)).differences(fingerprint(other)) == ["tokenizer"]


class Silent(WithoutStart):
    """Its encoding does not undo what a caller has set."""

    def encode(self, text: str) -> list[int]:
        return []


def test_what_callers_have_set_does_not_count(ctx) -> None:
    used = copy.deepcopy(ctx.tokenizer)
    used.backend_tokenizer.enable_truncation(5)
    used.backend_tokenizer.enable_padding(pad_token="<pad>")
    found, other = (fingerprint(float_family(replace(ctx, tokenizer=Silent(one)))) for one in (ctx.tokenizer, used))
    assert found == other


def test_a_checkpoint_error_comes_out(tmp_path: Path) -> None:
    set_processor(make_llava_checkpoint(tmp_path), do_center_crop=False)
    with pytest.raises(CheckpointError, match="tiles of varying size"):
        fingerprint_of(tmp_path)
