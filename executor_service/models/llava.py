"""LLaVA-1.5 on the stock path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from executor_service.layers.activations import fuse_activations
from executor_service.layers.patches import Levels, PatchProduct, takes_levels
from executor_service.layers.tower_graphs import TowerGraphs
from executor_service.models.fused_tower import fuse_tower
from executor_service.models.stock import StockModel


class LlavaModel(StockModel):
    """CLIP or SigLIP tower, projector, Llama- or Mistral-shaped decoder."""

    hf_class = LlavaForConditionalGeneration
    patch_product: PatchProduct | None = None
    tower_graphs: TowerGraphs | None = None

    @takes_levels
    def embed_multimodal(self, pixel_values: Sequence[Tensor | Levels]) -> list[Tensor]:
        """Tiles [3, H, W] -> features [num_features, hidden] each."""
        pixels = self.join_tiles(pixel_values, torch.stack)
        return list(self.hf.model.get_image_features(pixel_values=pixels).pooler_output)

    def join_tiles(self, tiles: Sequence[Tensor | Levels], join: Callable[[list[Tensor]], Tensor]) -> Tensor:
        """One batch [N, 3, H, W] of what the tower takes; levels become patches where the tower's product is ours."""
        levels = [tile for tile in tiles if isinstance(tile, Levels)]
        is_uniform = len(levels) == len(tiles) and all(one.table is levels[0].table for one in levels)
        if self.patch_product is not None and is_uniform:
            return self.patch_product.pixels_of(join([one.tensor for one in levels]), levels[0].table)
        return join([tile.normalized(self.hf.dtype) if isinstance(tile, Levels) else tile for tile in tiles])

    def fuse_decoder(self) -> bool:
        """Also the tower's convolution, layers and activations; whether the decoder has a twin is what it returns."""
        fuse_activations(self.hf.model.vision_tower)
        fuse_tower(self.hf.model.vision_tower, self.hf.config.vision_feature_layer)
        product = PatchProduct.install(self.hf.model.vision_tower)
        # Not as a module of this one: it is the tower's already.
        self.__dict__["patch_product"] = product
        self.tower_graphs = None if product is None else TowerGraphs(self.hf.model.vision_tower, product)
        return super().fuse_decoder()

    def rename_weight(self, name: str) -> str | None:
        """Checkpoint names, older and newer, to ours; None for what is computed instead of loaded."""
        return rename_llava_weight(name, self._names)

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.named_parameters())


def rename_llava_weight(name: str, known: frozenset[str]) -> str | None:
    """Both layouts of LLaVA checkpoints: `language_model.model.…` and `model.language_model.…`.

    CLIP and SigLIP towers have a `vision_model.` level in some transformers versions and not in others.
    """
    if name.endswith((".rotary_emb.inv_freq", ".embeddings.position_ids")):
        return None
    name = name.removeprefix("model.")
    for old, new in (("language_model.lm_head.", "lm_head."), ("language_model.model.", "language_model.")):
        if name.startswith(old):
            name = new + name.removeprefix(old)
    if not name.startswith("lm_head."):
        name = f"model.{name}"
    candidates = (name, name.replace(".vision_model.", ".", 1), name.replace("tower.", "tower.vision_model.", 1))
    return next((f"hf.{candidate}" for candidate in candidates if f"hf.{candidate}" in known), f"hf.{name}")
