"""What is served: a random LLaVA whose language model has 135M parameters, and pictures nobody has seen before."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from tests.checkpoints import processor_config, random_weights, write_json, write_tokenizer, write_weights

IMAGE_SIZE = 112
PATCH_SIZE = 14


def make_random_llava(path: Path, is_small: bool = False, image_size: int = IMAGE_SIZE) -> Path:
    """Write the checkpoint directory: a Llama of 30 layers x 576 with tied embeddings, and a small CLIP tower.

    `is_small` makes the language model tiny, for trying a benchmark out or where no model runs.
    """
    path.mkdir(parents=True)
    layers, width, inner, vocabulary = (2, 192, 256, 512) if is_small else (30, 576, 1536, 49152)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=192, intermediate_size=768, num_hidden_layers=4, num_attention_heads=3,
            image_size=image_size, patch_size=PATCH_SIZE,
        ),
        text_config=LlamaConfig(
            hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=width // 64,
            num_key_value_heads=width // 192, vocab_size=vocabulary, max_position_embeddings=2048,
            tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        ),
        image_token_index=3,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        dtype="float32",
        architectures=["LlavaForConditionalGeneration"],
    )  # fmt: skip
    config.save_pretrained(path)
    write_weights(path, random_weights(config, seed=0), "new", shards=1)
    write_tokenizer(path)
    write_json(path / "preprocessor_config.json", processor_config("clip", image_size))
    return path


def pictures(count: int, height: int, width: int, seed: int = 0) -> list[bytes]:
    """`count` JPEG files of smooth noise, each another picture."""
    rng = np.random.default_rng(seed)
    files = []
    for _ in range(count):
        coarse = rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files
