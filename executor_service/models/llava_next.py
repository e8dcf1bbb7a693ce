"""LLaVA-NeXT on the stock path: tiles through the tower, then unpadded and packed picture by picture."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlavaNextForConditionalGeneration

from executor_service.models.llava import LlavaModel


class LlavaNextModel(LlavaModel):
    """LLaVA-1.5's parts and names, with a newline feature and pictures of several tiles."""

    hf_class = LlavaNextForConditionalGeneration

    def embed_multimodal(self, pixel_values: list[Tensor], image_sizes: list[Tensor]) -> list[Tensor]:  # type: ignore[override]
        """Tiles [N, 3, H, W] and sizes [2] (height, width) -> features [num_features, hidden] each."""
        sizes = torch.stack(image_sizes).tolist()
        features = self.hf.model.get_image_features(pixel_values=torch.cat(pixel_values), image_sizes=sizes)
        return list(features.pooler_output)
