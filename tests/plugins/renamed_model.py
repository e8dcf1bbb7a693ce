"""A class whose decoder is not `model.language_model`, and a model that says where it is."""

from __future__ import annotations

import transformers
from torch import nn

from executor_service.models.llava import LlavaModel


class Renamed(transformers.LlavaForConditionalGeneration):
    """The decoder beside the tower instead of among its modules."""

    def __init__(self, config: transformers.LlavaConfig) -> None:
        super().__init__(config)
        self.text_decoder = self.model.language_model
        del self.model.language_model

    def get_input_embeddings(self) -> nn.Module:
        return self.text_decoder.embed_tokens


class RenamedModel(LlavaModel):
    hf_class = Renamed

    @property
    def language_model(self) -> nn.Module:
        return self.hf.text_decoder

    def rename_weight(self, name: str) -> str | None:
        renamed = super().rename_weight(name)
        return None if renamed is None else renamed.replace("hf.model.language_model.", "hf.text_decoder.")
