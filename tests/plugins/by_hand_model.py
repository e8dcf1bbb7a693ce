"""LLaVA-1.5 that takes any number of tiles per picture."""

from __future__ import annotations

import torch
from torch import Tensor

from executor_service.models.llava import LlavaModel


class ByHandModel(LlavaModel):
    def embed_multimodal(self, pixel_values: list[Tensor]) -> list[Tensor]:
        """[N, 3, H, W] -> features [N * 16, hidden]."""
        features = self.hf.model.get_image_features(pixel_values=torch.cat(pixel_values)).pooler_output
        counts = [len(tiles) for tiles in pixel_values]
        return [part.flatten(0, 1) for part in torch.stack(list(features)).split(counts)]
