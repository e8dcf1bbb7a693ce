"""Qwen2-Audio, in two files: this one needs no torch."""

from __future__ import annotations

import numpy as np
from transformers import Qwen2AudioConfig

from registry import MULTIMODAL_REGISTRY, InputContext, ItemLayout, MediaInfo, Run, SupportsMultiModal, TensorSpec
from registry.errors import UnusableMediaError


def layout(ctx: InputContext, media: MediaInfo) -> ItemLayout:
    """A log-mel spectrogram of fixed length, a mask of what is not padding, a feature per four frames."""
    extractor, config = ctx.feature_extractor, ctx.get_config(Qwen2AudioConfig)
    samples = min(media.num_samples, extractor.n_samples)
    num_frames = -(-samples // extractor.hop_length)
    num_features = ((num_frames - 1) // 2 + 1 - 2) // 2 + 1
    if num_features < 1:
        raise UnusableMediaError(f"the audio has {media.num_samples} samples, too few for a single feature")
    mask = np.arange(extractor.nb_max_frames) < num_frames
    begin, end = (ctx.tokenizer.convert_tokens_to_ids(name) for name in ("<|audio_bos|>", "<|audio_eos|>"))
    return ItemLayout(
        replacement=(Run(begin, 1, False), Run(config.audio_token_id, num_features), Run(end, 1, False)),
        tensors={"input_features": TensorSpec("float32", (extractor.feature_size, extractor.nb_max_frames))},
        constants={"attention_mask": mask.astype(np.int64)},
    )


@MULTIMODAL_REGISTRY.register_audio_layout(layout)
@MULTIMODAL_REGISTRY.register_audio_input_mapper()
@MULTIMODAL_REGISTRY.register_max_audio_tokens()
class Qwen2AudioForConditionalGeneration(SupportsMultiModal):
    executor_model = "tests.plugins.qwen2_audio_model:Qwen2AudioModel"
