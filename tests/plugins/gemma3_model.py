"""Gemma 3 on the executor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Gemma3ForConditionalGeneration

from executor_service.models.llava import rename_llava_weight
from executor_service.models.stock import StockModel


class Gemma3Model(StockModel):
    hf_class = Gemma3ForConditionalGeneration

    def embed_multimodal(self, pixel_values: list[Tensor]) -> list[Tensor]:
        """Tiles [3, H, W] -> features [num_features, hidden] each."""
        return list(self.hf.model.get_image_features(torch.stack(pixel_values)).pooler_output)

    def bidirectional_spans(self, items: Sequence) -> list[tuple[int, int]]:
        """All of a picture but its first and last token, which frame it."""
        return [(item.placeholder.offset + 1, item.placeholder.end - 1) for item in items]

    def rename_weight(self, name: str) -> str | None:
        return rename_llava_weight(name, {name for name, _ in self.named_parameters()})
