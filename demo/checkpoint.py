"""The demo model's architecture, its first weights, and its checkpoint folder."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from demo.prompts import IMAGE, MAX_MODEL_LEN

IMAGE_SIDE, PATCH_SIDE = 56, 8
GRID = IMAGE_SIDE // PATCH_SIDE
WIDTH = 128
LUMINANCE = (0.299, 0.587, 0.114)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """A fresh LLaVA-1.5-shaped model of 1.4 M parameters."""
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_MODEL_LEN,
        rms_norm_eps=1e-5,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIDE,
        patch_size=PATCH_SIDE,
        projection_dim=WIDTH,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=GRID * GRID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlavaForConditionalGeneration(config)
    _start_tower(model)
    return model


def image_processor(**options: bool) -> CLIPImageProcessorPil:
    """What LLaVA-1.5 does to a picture: shortest edge to the tower's side, centre crop, CLIP's mean and deviation."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIDE}, crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}, **options
    )


@torch.no_grad()
def _start_tower(model: LlavaForConditionalGeneration) -> None:
    """Start the tower seeing smooth contrast and knowing where patches lie.

    Nine thousand digits are too few to learn either: a tower trained alone reached 97 % from here, and 88 % in as many
    steps from CLIP's own random start.
    """
    tower = model.model.vision_tower
    embeddings = getattr(tower, "vision_model", tower).embeddings
    embeddings.patch_embedding.weight.copy_(_contrast_filters())
    embeddings.position_embedding.weight[1:] = _grid_positions()


def _contrast_filters() -> Tensor:
    """Random smooth filters over luminance: low cosine frequencies, none of them constant."""
    frequency = torch.arange(PATCH_SIDE)
    waves = torch.cos(math.pi * frequency[:, None] * (frequency + 0.5) / PATCH_SIDE)
    weight = torch.exp(-(frequency[:, None] + frequency) / 3)
    weight[0, 0] = 0
    filters = torch.einsum("fuv,ux,vy->fxy", torch.randn(WIDTH, PATCH_SIDE, PATCH_SIDE) * weight, waves, waves)
    filters /= filters.flatten(1).norm(dim=1)[:, None, None]
    return filters[:, None] * torch.tensor(LUMINANCE)[:, None, None]


def _grid_positions() -> Tensor:
    """Sines and cosines of each patch's row and column."""
    angle = torch.arange(GRID)[:, None] * 1.5 / 10 ** (torch.arange(WIDTH // 4) * 4 / WIDTH)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    return torch.cat([axis.repeat(GRID, 1), axis.repeat_interleave(GRID, dim=0)], dim=1)


def save_checkpoint(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write an ordinary Hugging Face checkpoint."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    _name_tower_as_released(folder / "model.safetensors")
    tokenizer.save_pretrained(folder)
    _name_tokenizer_as_released(folder / "tokenizer_config.json")
    _write_json(folder / "preprocessor_config.json", _image_processor_config())
    _write_json(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "image_token": IMAGE,
            "patch_size": PATCH_SIDE,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
    )


def _name_tower_as_released(path: Path) -> None:
    """Give the tower's weights the names that LLaVA-1.5 checkpoints have: every reader knows those."""
    weights = {name.replace("vision_tower.", "vision_tower.vision_model."): w for name, w in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)


def _name_tokenizer_as_released(path: Path) -> None:
    """Name the class and the image token as transformers 4 and 5 both read them."""
    config = json.loads(path.read_text())
    del config["backend"], config["extra_special_tokens"]
    renamed = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": [IMAGE]}
    _write_json(path, config | renamed)


def _image_processor_config() -> dict[str, object]:
    """The image processor's settings under the name that loads with every backend."""
    processor = image_processor()
    names = ["resample", "rescale_factor", "image_mean", "image_std"]
    switches = ["do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"]
    values = {name: getattr(processor, name) for name in names + switches}
    sizes = {"size": {"shortest_edge": IMAGE_SIDE}, "crop_size": {"height": IMAGE_SIDE, "width": IMAGE_SIDE}}
    return {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor", **sizes, **values}


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
