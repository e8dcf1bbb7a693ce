"""LLaVA-1.5 on the stock path."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from executor_service.models.stock import StockModel


class LlavaModel(StockModel):
    """CLIP or SigLIP tower, projector, Llama- or Mistral-shaped decoder."""

    hf_class = LlavaForConditionalGeneration

    def embed_multimodal(self, pixel_values: list[Tensor]) -> list[Tensor]:
        """Tiles [3, H, W] -> features [num_features, hidden] each."""
        features = self.hf.model.get_image_features(pixel_values=torch.stack(pixel_values)).pooler_output
        return list(features)

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
