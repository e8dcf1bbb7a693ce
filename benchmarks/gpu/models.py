"""Random checkpoints of real geometries, ordinary Hugging Face directories, written where they are used in seconds.

Weights are made on the GPU, scaled by fan-in so that activations stay finite, and written in several shards at once.
`tiny-…` are of the same make and small enough for a CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    PreTrainedConfig,
)

from tests.checkpoints import checkpoint_name, processor_config, write_json

PINPOINTS: Final = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SHARD_BYTES: Final = 1 << 30
NUM_WRITERS: Final = 8
LAYOUT: Final = "old"
"""Names as published checkpoints of these models have them: every engine knows those."""
HEAD: Final = checkpoint_name("lm_head.weight", LAYOUT)
_SPECIAL: Final = ("<pad>", "<s>", "</s>")
_DTYPE_CODES: Final = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def llava_7b() -> LlavaConfig:
    """LLaVA-1.5-7B: CLIP-L/336 and a Llama of 32 x 4096."""
    return LlavaConfig(
        vision_config=_clip_large(),
        text_config=LlamaConfig(
            hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=32, vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5, **_ids(),
        ),
        **_common(32000, "LlavaForConditionalGeneration", "bfloat16"),
    )  # fmt: skip


def llava_next_mistral_7b() -> LlavaNextConfig:
    """LLaVA-NeXT with a Mistral-7B: 32 query and 8 key heads, tiles of 336 x 336."""
    return LlavaNextConfig(
        vision_config=_clip_large(),
        text_config=MistralConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, vocab_size=32064, max_position_embeddings=32768, rms_norm_eps=1e-5,
            sliding_window=None, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, **_ids(),
        ),
        image_grid_pinpoints=PINPOINTS,
        **_common(32000, "LlavaNextForConditionalGeneration", "bfloat16"),
    )  # fmt: skip


def tiny_llava() -> LlavaConfig:
    """The first in small: 336 x 336 pictures with patches of 56."""
    return LlavaConfig(
        vision_config=_clip_tiny(),
        text_config=LlamaConfig(**_tiny_decoder(num_key_value_heads=4)),
        **_common(500, "LlavaForConditionalGeneration", "float32"),
    )


def tiny_llava_next() -> LlavaNextConfig:
    """The second in small."""
    return LlavaNextConfig(
        vision_config=_clip_tiny(),
        text_config=MistralConfig(**_tiny_decoder(num_key_value_heads=1), sliding_window=None),
        image_grid_pinpoints=PINPOINTS,
        **_common(500, "LlavaNextForConditionalGeneration", "float32"),
    )


GEOMETRIES: Final[Mapping[str, Callable[[], Any]]] = {
    "llava-1.5-7b": llava_7b,
    "llava-next-mistral-7b": llava_next_mistral_7b,
    "tiny-llava": tiny_llava,
    "tiny-llava-next": tiny_llava_next,
}


def _clip_large() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    )  # fmt: skip


def _clip_tiny() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=336,
        patch_size=56, projection_dim=32,
    )  # fmt: skip


def _tiny_decoder(num_key_value_heads: int) -> dict[str, Any]:
    return {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": num_key_value_heads, "vocab_size": 512, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, **_ids(),
    }  # fmt: skip


def _ids() -> dict[str, int]:
    return {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _common(image_token: int, architecture: str, dtype: str) -> dict[str, Any]:
    return {
        "image_token_index": image_token, "vision_feature_select_strategy": "default", "vision_feature_layer": -2,
        "projector_hidden_act": "gelu", "tie_word_embeddings": False, "dtype": dtype, "architectures": [architecture],
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Write one checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.models", description=__doc__)
    parser.add_argument("geometry", choices=GEOMETRIES)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(argv)
    began = time.perf_counter()
    num_bytes = write_checkpoint(options.folder, options.geometry)
    print(f"{options.folder}: {num_bytes / 1e9:.2f} GB in {time.perf_counter() - began:.1f} s")
    return 0


def checkpoint_folder(geometry: str, num_bytes: float = 16e9) -> Path:
    """Where a checkpoint is or else goes: shared memory if it has room, which is page cache without a disk."""
    shared, plain = (Path(root) / f"diptych-{geometry}" for root in ("/dev/shm", tempfile.gettempdir()))
    for folder in (shared, plain):
        if is_whole(folder):
            return folder
    has_room = shared.parent.is_dir() and shutil.disk_usage(shared.parent).free > 1.2 * num_bytes
    return shared if has_room else plain


def is_whole(folder: Path) -> bool:
    """The weights' index is written last; one with other names is of another version of this file."""
    index = folder / "model.safetensors.index.json"
    return index.is_file() and HEAD in json.loads(index.read_text("utf-8"))["weight_map"]


def ensure_checkpoint(geometry: str) -> Path:
    """The directory of a whole checkpoint, written unless it is there."""
    folder = checkpoint_folder(geometry)
    if not is_whole(folder):
        write_checkpoint(folder, geometry)
    return folder


def write_checkpoint(folder: Path, geometry: str, device: str | None = None) -> int:
    """Write everything, the weights' index last; returns the weights' bytes."""
    config = write_files(folder, geometry)
    return _write_weights(folder, config, device or ("cuda" if torch.cuda.is_available() else "cpu"))


def write_files(folder: Path, geometry: str) -> Any:
    """Configuration, tokenizer and processor alone; returns the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    config = GEOMETRIES[geometry]()
    config.save_pretrained(folder)
    GenerationConfig(**_ids()).save_pretrained(folder)
    _write_tokenizer(folder, config.image_token_index)
    _write_processor(folder, config)
    return config


def _write_tokenizer(folder: Path, image_token: int) -> None:
    """One word `w123` per token id, so that a prompt has as many tokens as words."""
    words = {token: index for index, token in enumerate(_SPECIAL)}
    words |= {f"w{index}": index for index in range(len(words), image_token)}
    words["<image>"] = image_token
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (*_SPECIAL, "<image>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "w3"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **tokens})


def _write_processor(folder: Path, config: PreTrainedConfig) -> None:
    is_next = isinstance(config, LlavaNextConfig)
    anyres = {"image_grid_pinpoints": PINPOINTS} if is_next else {}
    kind, size = "llava-next" if is_next else "clip", config.vision_config.image_size
    write_json(folder / "preprocessor_config.json", processor_config(kind, size, **anyres))
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaNextProcessor" if is_next else "LlavaProcessor", "image_token": "<image>",
            "patch_size": config.vision_config.patch_size, "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
    )  # fmt: skip


def _write_weights(folder: Path, config: PreTrainedConfig, device: str) -> int:
    dtype = getattr(torch, str(config.dtype).removeprefix("torch."))
    shapes = weight_shapes(config)
    shards = _split(shapes, dtype.itemsize)
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    layers = config.text_config.num_hidden_layers

    def write(name: str, shard: Sequence[str]) -> int:
        return _write_shard(folder / name, {key: shapes[key] for key in shard}, dtype, device, layers)

    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        total = sum(pool.map(write, names, shards))
    places = {checkpoint_name(key, LAYOUT): name for name, shard in zip(names, shards, strict=True) for key in shard}
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
    return total


def weight_shapes(config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Shape of every parameter by transformers' name for it."""
    is_next = isinstance(config, LlavaNextConfig)
    with torch.device("meta"):
        model = (LlavaNextForConditionalGeneration if is_next else LlavaForConditionalGeneration)(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _split(shapes: Mapping[str, torch.Size], item_size: int) -> list[list[str]]:
    """Names in order, in shards of about SHARD_BYTES."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        if shards[-1] and filled + shape.numel() * item_size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += shape.numel() * item_size
    return shards


def _write_shard(path: Path, shapes: Mapping[str, torch.Size], dtype: torch.dtype, device: str, layers: int) -> int:
    """A safetensors file: the header's length, a JSON header, the tensors one after another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + shape.numel() * dtype.itemsize
        header[checkpoint_name(name, LAYOUT)] = {
            "dtype": _DTYPE_CODES[dtype], "shape": list(shape), "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = random_weight(name, shape, dtype, device, layers).cpu()
            file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return offset


def random_weight(name: str, shape: torch.Size, dtype: torch.dtype, device: str, layers: int) -> Tensor:
    """The same for the same name; what goes into the residual stream is smaller the more layers there are."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(shape, generator=generator, dtype=torch.float32, device=device)
    if "norm" in name and name.endswith("weight"):
        return (1 + 0.1 * noise).to(dtype)
    if name.endswith("bias"):
        return (0.1 * noise).to(dtype)
    if len(shape) == 1 or ("embed" in name and "patch" not in name):
        return (0.5 * noise).to(dtype)
    scale = 1 / math.sqrt(shape[1:].numel())
    if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")):
        scale /= math.sqrt(2 * layers)
    return (scale * noise).to(dtype)


if __name__ == "__main__":
    sys.exit(main())
