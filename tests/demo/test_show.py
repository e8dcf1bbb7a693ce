"""The page's parts: tiles, token strip and time line say what the services say."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from demo.measuring.index import Question, read_index
from demo.show.asking import wording
from demo.show.stages import stages
from demo.show.strip import segments
from demo.show.tiles import look
from demo.training.anyres import cut
from diptych.client import Client
from registry import MediaLimits
from registry.families import open_family
from registry.family import ModelFamily
from tests.conftest import DEMO_MODEL

QUESTIONS = read_index(DEMO_MODEL.parent / "held_out")
SEVERAL = max(QUESTIONS, key=lambda question: len(question.pictures))


@pytest.fixture(scope="module")
def family() -> ModelFamily:
    return open_family(DEMO_MODEL, MediaLimits({"image": 4}))


def pixels(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


@pytest.mark.parametrize("question", QUESTIONS[::25], ids=lambda question: str(question.number))
def test_tiles_are_what_training_saw(family: ModelFamily, question: Question) -> None:
    """The mapper of the services and the arithmetic that the model was trained with agree on every pixel."""
    path = question.pictures[0]
    seen, trained = look(family, path), cut(load_image(str(path)))
    assert seen.num_tokens == len(trained.sources)
    assert len(seen.tiles) % seen.columns == 0
    np.testing.assert_array_equal(np.stack([pixels(url) for url in (seen.whole, *seen.tiles)]), trained.pixels)


def test_the_strip_is_the_plan(family: ModelFamily, served_demo) -> None:
    with Client(served_demo.preprocess_address) as client:
        plan = client.plan(wording(SEVERAL, [], 0))
    strip = segments(plan, family.ctx.tokenizer)
    assert [segment.start for segment in strip] == [0, *(segment.end + 1 for segment in strip[:-1])]
    assert strip[-1].end == len(plan.prompt_token_ids) - 1
    assert [segment.picture for segment in strip if segment.picture] == [1, 2, 3, 4]
    assert [segment.count for segment in strip if segment.picture] == [item.length for item in plan.items]
    assert [segment.count for segment in strip if segment.picture] == [
        look(family, path).num_tokens for path in SEVERAL.pictures
    ]
    assert all(len(segment.tokens) == segment.count for segment in strip if segment.picture is None)
    text = "".join(token for segment in strip for token in segment.tokens)
    assert text.startswith("<s>USER:␣↵")
    assert text.endswith("␣ASSISTANT:")


def test_stages_follow_one_another() -> None:
    times = {"plan": 0.001, "decode_media": 0.002, "map": 0.001, "transfer": 0.005, "queue": 0.0, "prefill": 0.03}
    line = {stage.name: stage for stage in stages({**times, "generate": 0.01})}
    starts = {name: round(stage.start) for name, stage in line.items()}
    assert starts == {"plan": 0, "decode": 1, "map": 3, "transfer": 1, "queue": 6, "prefill": 6, "generate": 36}
    assert line["generate"].left + line["generate"].width == pytest.approx(100)
    assert {stage.service for stage in stages(times)} == {"preprocess", "executor"}
    assert [stage.name for stage in stages({"plan": 0.001, "prefill": 0.002})] == ["plan", "prefill"]
    assert stages({}) == []
