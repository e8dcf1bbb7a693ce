"""Qwen2-Audio on the executor."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Qwen2AudioForConditionalGeneration
from transformers.masking_utils import create_bidirectional_mask

from executor_service.models.stock import StockModel


class Qwen2AudioModel(StockModel):
    hf_class = Qwen2AudioForConditionalGeneration

    def embed_multimodal(self, input_features: list[Tensor], attention_mask: list[Tensor]) -> list[Tensor]:
        """Spectrograms [mel, frames] and masks [frames] -> features [num_features, hidden] each."""
        tower, spectrograms = self.hf.model.audio_tower, torch.stack(input_features)
        inner, outer = tower._get_feat_extract_output_lengths(torch.stack(attention_mask).sum(-1))
        places = torch.arange((spectrograms.shape[-1] - 2) // 2 + 1)
        mask = create_bidirectional_mask(
            config=tower.config,
            inputs_embeds=torch.zeros((len(inner), len(places), 1), dtype=spectrograms.dtype),
            attention_mask=(places < inner[:, None]).long(),
        )
        hidden = tower(spectrograms, attention_mask=mask).last_hidden_state
        features = self.hf.model.multi_modal_projector(hidden)
        return [rows[:length] for rows, length in zip(features, outer.tolist(), strict=True)]
