"""LLaVA-NeXT on the stock path: tiles through the tower, then unpadded and packed picture by picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlavaNextForConditionalGeneration

from executor_service.layers.patches import Levels, takes_levels
from executor_service.models.llava import LlavaModel


class LlavaNextModel(LlavaModel):
    """LLaVA-1.5's parts and names, with a newline feature and pictures of several tiles."""

    hf_class = LlavaNextForConditionalGeneration

    @takes_levels
    def embed_multimodal(  # type: ignore[override]
        self, pixel_values: Sequence[Tensor | Levels], image_sizes: list[Tensor]
    ) -> list[Tensor]:
        """Tiles [N, 3, H, W] and sizes [2] (height, width) -> features [num_features, hidden] each."""
        sizes = torch.stack(image_sizes).tolist()
        features = self.hf.model.get_image_features(
            pixel_values=self.join_tiles(pixel_values, torch.cat), image_sizes=sizes
        )
        return list(features.pooler_output)
