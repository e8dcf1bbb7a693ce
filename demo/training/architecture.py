"""The demo model's architecture, its first weights, and its checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from demo.training.anyres import GRID, PATCH_SIDE, PINPOINTS, TILE_SIDE
from demo.training.chat import IMAGE, MAX_MODEL_LEN

WIDTH = 256
NUM_LAYERS = 6
MAX_SHARD = "13MB"
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaNextForConditionalGeneration:
    """Build a fresh LLaVA-NeXT of about 10 M parameters."""
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=704,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_MODEL_LEN,
        rms_norm_eps=1e-5,
        initializer_range=0.04,
        **special,
    )
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        image_size=TILE_SIDE,
        patch_size=PATCH_SIDE,
        projection_dim=WIDTH,
    )
    # The last layer's features: a tower of this size has no layer to spare.
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=GRID * GRID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        **special,
    )
    model = LlavaNextForConditionalGeneration(config)
    _start_tower(model)
    return model


@torch.no_grad()
def _start_tower(model: LlavaNextForConditionalGeneration) -> None:
    """Start the tower with patches that count and with knowledge of where they lie."""
    tower = model.model.vision_tower
    embeddings = getattr(tower, "vision_model", tower).embeddings
    torch.nn.init.normal_(embeddings.patch_embedding.weight, std=1.5 / (3 * PATCH_SIDE**2) ** 0.5)
    embeddings.position_embedding.weight[1:] = _grid_positions() / 2


def _grid_positions() -> Tensor:
    """Sines and cosines of each patch's row and column."""
    angle = torch.arange(GRID)[:, None] * 1.5 / 10 ** (torch.arange(WIDTH // 4) * 4 / WIDTH)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    return torch.cat([axis.repeat(GRID, 1), axis.repeat_interleave(GRID, dim=0)], dim=1)


def save_weights(model: LlavaNextForConditionalGeneration, folder: Path) -> None:
    """Write config.json, generation_config.json and the bfloat16 weights in small shards."""
    copy = LlavaNextForConditionalGeneration(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16)
    ids = {name: getattr(model.config.text_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    copy.generation_config = GenerationConfig(**ids)
    copy.save_pretrained(folder, max_shard_size=MAX_SHARD)
    for shard in folder.glob("*.safetensors"):
        shard.chmod(0o644)


def save_processor(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the tokenizer, the chat template and the processor's settings."""
    tokenizer.save_pretrained(folder)
    _write_json(folder / "preprocessor_config.json", _image_processor_config())
    processor = {
        "processor_class": "LlavaNextProcessor",
        "image_token": IMAGE,
        "patch_size": PATCH_SIDE,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    _write_json(folder / "processor_config.json", processor)


def _image_processor_config() -> dict[str, object]:
    """Name the settings so that every backend loads them."""
    switches = ["do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb", "do_pad"]
    return {
        "image_processor_type": "LlavaNextImageProcessor",
        "processor_class": "LlavaNextProcessor",
        "size": {"shortest_edge": TILE_SIDE},
        "crop_size": {"height": TILE_SIDE, "width": TILE_SIDE},
        "image_grid_pinpoints": PINPOINTS,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": MEAN,
        "image_std": STD,
        **dict.fromkeys(switches, True),
    }


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
