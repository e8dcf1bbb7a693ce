"""Makes tiny random LLaVA-1.5 and LLaVA-NeXT checkpoints with weights: ordinary Hugging Face directories."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from tests.tiny_checkpoint import LIST_TEMPLATE, make_tokenizer

TOWERS: Final = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}
LANGUAGES: Final = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
NUM_TOKENS: Final = 320
VOCAB_SIZE: Final = 328
"""Rows of the embedding: a few more than the tokenizer has tokens, as in real checkpoints."""
PROCESSORS: Final[Mapping[str, dict[str, Any]]] = {
    "clip": {
        "image_processor_type": "CLIPImageProcessor",
        "do_center_crop": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    "siglip": {
        "image_processor_type": "SiglipImageProcessor",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
    "llava-next": {
        "image_processor_type": "LlavaNextImageProcessor",
        "do_center_crop": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    "llava-pad": {
        "image_processor_type": "LlavaImageProcessor",
        "do_pad": True,
        "do_center_crop": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
}

Layout = Literal["new", "old", "module"]


def make_llava_checkpoint(
    path: Path,
    *,
    tower: Literal["clip", "siglip"] = "clip",
    language: Literal["llama", "mistral", "qwen2"] = "llama",
    image_size: int = 56,
    patch_size: int = 14,
    select_strategy: Literal["default", "full"] = "default",
    feature_layer: int | list[int] = -2,
    layout: Layout = "new",
    processor: Literal["clip", "siglip", "llava-pad"] = "clip",
    tie: bool = False,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    sliding_window: int | None = None,
    seed: int = 0,
    max_positions: int = 2048,
    pinpoints: list[list[int]] | None = None,
) -> Path:
    """Write a checkpoint directory; `transformers` and both services load it.

    `layout` is how configuration and weights are named: "new" as transformers 5 saves them, "old" as the first
    LLaVA-1.5 checkpoints have them (a partial `text_config`, `vision_tower.vision_model.…`), "module" by the names
    of the modules (`model.language_model.…`, `lm_head.…`). All hold the same numbers for the same seed.
    `pinpoints` (canvas sizes, height and width) makes it a LLaVA-NeXT.
    """
    path.mkdir(parents=True, exist_ok=True)
    windows = {
        "llama": {},
        "mistral": {"sliding_window": sliding_window},
        # Of its two layers the second has the window.
        "qwen2": {"use_sliding_window": True, "sliding_window": sliding_window, "max_window_layers": 1},
    }
    config_class = LlavaConfig if pinpoints is None else LlavaNextConfig
    name = config_class.__name__.replace("Config", "ForConditionalGeneration")
    anyres = {} if pinpoints is None else {"image_grid_pinpoints": pinpoints}
    config = config_class(
        vision_config=TOWERS[tower](
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=image_size,
            patch_size=patch_size,
        ),
        text_config=LANGUAGES[language](
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=VOCAB_SIZE, max_position_embeddings=max_positions, tie_word_embeddings=tie, bos_token_id=1,
            eos_token_id=2, **windows[language],
        ),
        image_token_index=3,
        vision_feature_select_strategy=select_strategy,
        vision_feature_layer=feature_layer,
        tie_word_embeddings=tie,
        dtype=str(dtype).removeprefix("torch."),
        architectures=[name],
        **anyres,
    )  # fmt: skip
    (write_old_config if layout == "old" else config_class.save_pretrained)(config, path)
    write_weights(path, {name: t.to(dtype) for name, t in random_weights(config, seed).items()}, layout, shards)
    write_tokenizer(path)
    kind = processor if pinpoints is None else "llava-next"
    write_json(path / "preprocessor_config.json", processor_config(kind, image_size, **anyres))
    return path


def processor_config(kind: str, image_size: int, **changes: Any) -> dict[str, Any]:
    """Content of `preprocessor_config.json`; `changes` replace or, where None, remove entries."""
    square = {"height": image_size, "width": image_size}
    sizes = {"size": square} if kind == "siglip" else {"size": {"shortest_edge": image_size}, "crop_size": square}
    config = {
        "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3,
        "rescale_factor": 1 / 255, **PROCESSORS[kind], **sizes, **changes,
    }  # fmt: skip
    return {key: value for key, value in config.items() if value is not None}


def random_weights(config: LlavaConfig | LlavaNextConfig, seed: int) -> dict[str, Tensor]:
    """Weights by parameter name, scaled so that every layer, position and pixel matters to the answer.

    That is by fan-in, but for attention: with sharper queries, louder outputs and quiet embeddings a token's
    neighbours and their order matter as much as the token itself.
    """
    generator = torch.Generator().manual_seed(seed)
    is_next = isinstance(config, LlavaNextConfig)
    model_class = LlavaNextForConditionalGeneration if is_next else LlavaForConditionalGeneration
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in model_class(config).named_parameters()}
    return {
        name: _random_weight(name, shape, config.tie_word_embeddings, generator)
        for name, shape in sorted(shapes.items())
    }


def _random_weight(name: str, shape: torch.Size, tied: bool, generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.1 * noise
    if name.endswith("image_newline"):
        return noise
    if "bias" in name:
        return 0.1 * noise
    if ("embedding" in name and "patch" not in name) or name.endswith("probe"):
        return noise
    if "embed_tokens" in name and not tied:
        return 0.3 * noise
    louder = {"q_proj": 3, "o_proj": 2}.get(name.split(".")[-2], 1)
    return louder * noise * shape[1:].numel() ** -0.5


def write_weights(path: Path, weights: Mapping[str, Tensor], layout: Layout, shards: int) -> None:
    """`model.safetensors`, or that many shards and their index."""
    named = {checkpoint_name(name, layout): tensor.contiguous() for name, tensor in weights.items()}
    if shards == 1:
        save_file(named, path / "model.safetensors", {"format": "pt"})
        return
    files = {name: f"model-{index % shards + 1:05}-of-{shards:05}.safetensors" for index, name in enumerate(named)}
    for file in set(files.values()):
        save_file({name: named[name] for name in named if files[name] == file}, path / file, {"format": "pt"})
    total = sum(tensor.nbytes for tensor in named.values())
    write_json(path / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": files})


def checkpoint_name(name: str, layout: Layout) -> str:
    """A parameter's name in a checkpoint of that layout."""
    name = name.replace("vision_tower.vision_model.", "vision_tower.")
    if layout != "new":
        name = name.replace("vision_tower.", "vision_tower.vision_model.")
    if layout == "module":
        return name
    name = name.replace("model.language_model.", "language_model.model.")
    return f"language_model.{name}" if name.startswith("lm_head.") else name.removeprefix("model.")


def write_old_config(config: LlavaConfig | LlavaNextConfig, path: Path) -> None:
    """`config.json` as transformers 4.36 wrote it: parts hold only what differs from their class's defaults."""
    old = {
        "architectures": config.architectures,
        "ignore_index": -100,
        "image_token_index": config.image_token_index,
        "model_type": config.model_type,
        "pad_token_id": 0,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": str(config.dtype).removeprefix("torch."),
        "transformers_version": "4.36.0.dev0",
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }
    if isinstance(config, LlavaNextConfig):
        old["image_grid_pinpoints"] = config.image_grid_pinpoints
    for part in ("text_config", "vision_config"):
        values, defaults = getattr(config, part).to_dict(), type(getattr(config, part))().to_dict()
        kept = {key: value for key, value in values.items() if value != defaults.get(key)}
        kept.pop("head_dim", None)
        old[part] = {**kept, "model_type": values["model_type"]}
    write_json(path / "config.json", old)


def write_tokenizer(path: Path, num_tokens: int = NUM_TOKENS) -> None:
    """A byte-level BPE tokenizer with <pad>, <s>, </s> and <image>, and a chat template with lists of parts."""
    make_tokenizer(num_tokens).save(str(path / "tokenizer.json"))
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    write_json(path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **tokens})
    (path / "chat_template.jinja").write_text(LIST_TEMPLATE, "utf-8")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as a JSON file."""
    path.write_text(json.dumps(value, indent=1), "utf-8")


class Checkpoints:
    """Checkpoints below one directory, each parameter set made once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[str, Path] = {}

    def __call__(self, **parameters: Any) -> Path:
        """The directory of `make_llava_checkpoint(…, **parameters)`; to be read, not changed."""
        key = repr(sorted(parameters.items()))
        if key not in self._made:
            self._made[key] = make_llava_checkpoint(self._root / f"checkpoint-{len(self._made)}", **parameters)
        return self._made[key]
