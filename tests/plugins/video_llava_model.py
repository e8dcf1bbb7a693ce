"""Video-LLaVA on the executor."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import VideoLlavaForConditionalGeneration

from executor_service.models.stock import StockModel


class VideoLlavaModel(StockModel):
    hf_class = VideoLlavaForConditionalGeneration

    def embed_multimodal(
        self, pixel_values: list[Tensor] | None = None, pixel_values_videos: list[Tensor] | None = None
    ) -> list[Tensor]:
        """Tiles [3, H, W] or frames [F, 3, H, W] -> features [num_features, hidden] each."""
        if pixel_values is not None:
            return list(self.hf.model.get_image_features(torch.stack(pixel_values)).pooler_output)
        features = [self.hf.model.get_video_features(frames[None]).pooler_output for frames in pixel_values_videos]
        return [rows.flatten(0, 1) for rows in features]
