"""The checkpoints that tests are made with are what they say: every layout holds one and the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration

from tests.checkpoints import Checkpoints, random_weights

PROMPT = [1, 40, 41, *[3] * 16, 50, 51, 52]
VARIANTS = [
    {"layout": "old", "shards": 3},
    {"layout": "module"},
    {"language": "mistral", "sliding_window": 8, "layout": "old"},
    {"tie": True, "layout": "module", "shards": 2},
    {"tower": "siglip", "select_strategy": "full", "layout": "old", "feature_layer": [-2, -1]},
]


def load(path: Path) -> LlavaForConditionalGeneration:
    """transformers' model in float64; fails if a weight is missing or left over."""
    model, info = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float64, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def logits(
    model: LlavaForConditionalGeneration, seed: int = 0, prompt: list[int] = PROMPT, positions: list[int] | None = None
) -> torch.Tensor:
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.inference_mode():
        position_ids = torch.tensor([positions or list(range(len(prompt)))])
        return model(torch.tensor([prompt]), pixel_values=pixels, position_ids=position_ids).logits[0, -1]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_layout_is_the_same_model(checkpoints: Checkpoints, variant: dict) -> None:
    as_saved = {**variant, "layout": "new", "shards": 1}
    assert torch.equal(logits(load(checkpoints(**variant))), logits(load(checkpoints(**as_saved))))


def test_new_layout_is_how_transformers_saves(checkpoints: Checkpoints, tmp_path: Path) -> None:
    LlavaForConditionalGeneration.from_pretrained(checkpoints()).save_pretrained(tmp_path)
    assert names(tmp_path) == names(checkpoints())


def names(path: Path) -> set[str]:
    with safe_open(path / "model.safetensors", "pt") as weights:
        return set(weights.keys())


def test_old_layout_is_that_of_the_first_checkpoints(checkpoints: Checkpoints) -> None:
    path = checkpoints(layout="old")
    assert {"language_model.lm_head.weight", "language_model.model.norm.weight"} <= names(path)
    assert "vision_tower.vision_model.embeddings.class_embedding" in names(path)
    config = json.loads((path / "config.json").read_text("utf-8"))
    assert config["image_token_index"] == 3
    assert "max_position_embeddings" not in config["text_config"]


CHANGES: dict[str, dict[str, Any]] = {
    "another picture": {"seed": 1},
    "another token": {"prompt": [*PROMPT[:2], 77, *PROMPT[3:]]},
    "another order": {"prompt": [*PROMPT[:-3], *reversed(PROMPT[-3:-1]), PROMPT[-1]]},
    "another position": {"positions": [*range(10), *range(11, len(PROMPT) + 1)]},
}


@pytest.mark.parametrize("parameters", [{}, {"tie": True}, {"tower": "siglip", "select_strategy": "full"}], ids=str)
def test_everything_matters_to_the_answer(checkpoints: Checkpoints, parameters: dict) -> None:
    """With weights of standard deviation 0.02, tests that compare likeliest tokens would pass whatever is wrong."""
    model = load(checkpoints(**parameters))
    answer = logits(model)
    assert answer.std() > 0.5
    moved = {name: float((logits(model, **change) - answer).abs().mean()) for name, change in CHANGES.items()}
    assert min(moved.values()) > 0.05, moved


@pytest.mark.parametrize("tie", [False, True])
def test_weights_are_scaled_by_fan_in(checkpoints: Checkpoints, tie: bool) -> None:
    weights = random_weights(LlavaConfig.from_pretrained(checkpoints(tie=tie)), 0)
    down = weights["model.language_model.layers.0.mlp.down_proj.weight"]
    assert down.std() == pytest.approx(96**-0.5, rel=0.1)
    assert weights["model.language_model.norm.weight"].mean() == pytest.approx(1, abs=0.1)
    embedding = weights["model.language_model.embed_tokens.weight"]
    assert embedding.std() == pytest.approx(64**-0.5 if tie else 0.3, rel=0.1)


def test_tokenizer(checkpoints: Checkpoints) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoints())
    text = "déjà vu 図\n\0 <image>!"
    ids = tokenizer.encode(text)
    assert (ids[0], ids.count(3)) == (1, 1)
    assert tokenizer.decode(ids[1:]) == text
    assert len(tokenizer.encode("the picture")) < 1 + len("the picture")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "USER: <image>\nwhat? ASSISTANT:"


def test_each_parameter_set_is_made_once(checkpoints: Checkpoints) -> None:
    assert checkpoints(seed=3) == checkpoints(seed=3) != checkpoints(seed=4)
