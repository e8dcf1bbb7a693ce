"""Tiny random checkpoints of the families in this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

from registry import InputContext
from tests.checkpoints import NUM_TOKENS, VOCAB_SIZE, _random_weight, processor_config, write_json, write_tokenizer
from tests.checkpoints import write_weights as write_llava_weights

DECODER: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 2048, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
AUDIO_TOKENS = ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
SECONDS, MEL_BINS = 1, 16
"""What the audio tower takes at most, and the rows of its spectrogram."""


def make_qwen2_audio(path: Path) -> Path:
    """Whisper's extractor at one second; token 320 stands for audio."""
    config = Qwen2AudioConfig(
        audio_config=Qwen2AudioEncoderConfig(
            num_mel_bins=MEL_BINS, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64, d_model=32,
            max_source_positions=SECONDS * 50,
        ).to_dict(),
        text_config=Qwen2Config(**DECODER).to_dict(),
        audio_token_index=NUM_TOKENS,
        architectures=["Qwen2AudioForConditionalGeneration"],
    )  # fmt: skip
    write_checkpoint(path, config, Qwen2AudioForConditionalGeneration, AUDIO_TOKENS)
    extractor = {
        "feature_extractor_type": "WhisperFeatureExtractor", "feature_size": MEL_BINS, "sampling_rate": 16000,
        "chunk_length": SECONDS, "hop_length": 160, "n_fft": 400, "padding_value": 0.0, "return_attention_mask": True,
    }  # fmt: skip
    write_json(path / "preprocessor_config.json", extractor)
    return path


def make_video_llava(path: Path, num_frames: int = 3) -> Path:
    """CLIP tiles of 56 pixels; token 3 stands for a picture, token 320 for a video of at most `num_frames`."""
    config = VideoLlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=56,
            patch_size=14,
        ).to_dict(),
        text_config=LlamaConfig(**DECODER).to_dict(),
        image_token_index=3,
        video_token_index=NUM_TOKENS,
        architectures=["VideoLlavaForConditionalGeneration"],
    )  # fmt: skip
    write_checkpoint(path, config, VideoLlavaForConditionalGeneration, ("<video>",))
    write_json(path / "preprocessor_config.json", processor_config("clip", 56))
    write_json(path / "video_preprocessor_config.json", {"num_frames": num_frames})
    return path


def make_gemma3(path: Path, sliding_window: int = 24) -> Path:
    """SigLIP tiles of 56 pixels, whose 16 features see each other; the first of two layers has the window.

    Token 3 stands for a picture, and 320 and 321 frame it.
    """
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=56,
            patch_size=14,
        ).to_dict(),
        text_config=Gemma3TextConfig(
            **DECODER, head_dim=16, query_pre_attn_scalar=16, sliding_window=sliding_window,
            layer_types=["sliding_attention", "full_attention"],
        ).to_dict(),
        mm_tokens_per_image=16,
        image_token_index=3,
        boi_token_index=NUM_TOKENS,
        eoi_token_index=NUM_TOKENS + 1,
        tie_word_embeddings=False,
        architectures=["Gemma3ForConditionalGeneration"],
    )  # fmt: skip
    write_checkpoint(path, config, Gemma3ForConditionalGeneration, ("<start_of_image>", "<end_of_image>"))
    write_json(path / "preprocessor_config.json", processor_config("siglip", 56))
    return path


def write_checkpoint(
    path: Path, config: PreTrainedConfig, model_class: type[PreTrainedModel], tokens: tuple[str, ...], seed: int = 0
) -> None:
    """Configuration, weights by parameter name, and the usual tokenizer with `tokens` from 320 on."""
    path.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(path)
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in model_class(config).named_parameters()}
    weights = {name: _random_weight(name, shape, False, generator) for name, shape in sorted(shapes.items())}
    write_llava_weights(path, weights, "module", 1)
    write_tokenizer(path)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in tokens])
    tokenizer.save(str(path / "tokenizer.json"))


def make_patchwork(path: Path) -> Path:
    """A model that transformers does not know."""
    from tests.plugins.patchwork import PatchworkConfig, PatchworkForImages, random_weights

    path.mkdir(parents=True, exist_ok=True)
    PatchworkConfig(architectures=["PatchworkForImages"], bos_token_id=1, eos_token_id=2).save_pretrained(path)
    write_tokenizer(path)
    ctx = InputContext.from_checkpoint(path, config_class=PatchworkConfig)
    save_file(random_weights(PatchworkForImages(ctx)), path / "model.safetensors", {"format": "pt"})
    return path
