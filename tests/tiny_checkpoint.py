"""Makes LLaVA-1.5-shaped checkpoint directories without weights, and pictures for them; needs no torch."""

from __future__ import annotations

import base64
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<image>")
TEXTS = (
    "USER: what is in the picture? ASSISTANT: a digit",
    "The quick brown fox jumps over the lazy dog.",
    "Größe, déjà vu, 図書館, Привет, 👩‍👩‍👧 and 42 %",
)
LIST_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
STRING_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant', 'system'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "[{{ message['role'] }}] {{ message['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_checkpoint(
    path: Path, *, chat_template: str | None = LIST_TEMPLATE, image_size: int = 28, vocab_size: int = 600
) -> Path:
    """A directory that the registry and the preprocess service accept: config, tokenizer, processor, template."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(vocab_size - 8)
    tokenizer.save(str(path / "tokenizer.json"))
    _write(path / "tokenizer_config.json", _tokenizer_config())
    make_config(image_size, vocab_size).save_pretrained(path)
    _write(path / "preprocessor_config.json", _processor_config(image_size))
    if chat_template is not None:
        (path / "chat_template.jinja").write_text(chat_template, "utf-8")
    return path


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer with the four special tokens, adding <s> in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def make_config(image_size: int, vocab_size: int) -> LlavaConfig:
    """A tiny LLaVA: 14-pixel patches, two layers."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=image_size,
        patch_size=14, projection_dim=32,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=vocab_size,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=3, architectures=["LlavaForConditionalGeneration"]
    )


def picture(height: int = 30, width: int = 40, seed: int = 0) -> Image.Image:
    """A noisy RGB picture."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    """The picture as a file's bytes."""
    file = BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    """Bytes as a data URL."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }


def _processor_config(image_size: int) -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "do_convert_rgb": True,
        "resample": 3,
    }


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value), "utf-8")
