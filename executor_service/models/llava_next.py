"""LLaVA-NeXT on the stock path: tiles through the tower, then unpadded and packed picture by picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaNextForConditionalGeneration
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

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

    def fuse_decoder(self) -> bool:
        """Also how a picture is made of its tiles: transformers' way waits for the GPU, to tell it lengths."""
        self.hf.model.pack_image_features = self._pack_pictures
        return super().fuse_decoder()

    def _pack_pictures(
        self, pictures: Sequence[Tensor], sizes: Sequence[Sequence[int]], *_: Any, image_newline: Tensor, **__: Any
    ) -> tuple[list[Tensor], None]:
        """Stands in for `pack_image_features`, for tiles [N, features, hidden] of each. Nobody reads lengths."""
        return [self._pack(tiles, size, image_newline) for tiles, size in zip(pictures, sizes, strict=True)], None

    def _pack(self, tiles: Tensor, size: Sequence[int], newline: Tensor) -> Tensor:
        """The overview, then the picture line by line, without its padding and with a newline behind each."""
        vision = self.hf.config.vision_config
        side = vision.image_size // vision.patch_size
        overview, *_ = tiles
        if len(tiles) == 1:
            return torch.cat((overview, newline[None]))
        grid = get_anyres_image_grid_shape(size, self.hf.config.image_grid_pinpoints, vision.image_size)
        mosaic = tiles[1:].unflatten(1, (side, side)).unflatten(0, grid).transpose(1, 2)
        lines = mosaic.flatten(2, 3).flatten(0, 1)
        picture = unpad_image(lines.permute(2, 0, 1), size).permute(1, 2, 0)
        picture = torch.cat((picture, newline.expand(len(picture), 1, -1)), dim=1)
        return torch.cat((overview, picture.flatten(0, 1)))
