"""transformers' own modules, with attention over our paged KV cache.

The stock path, which reaches every family and is the reference. Where `models.fused` knows the decoder, its fused twin
runs instead, if asked for.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from executor_service.layers.attention import IMPLEMENTATION
from executor_service.layers.context import current_context
from executor_service.layers.linear import Linear
from executor_service.models.fused import FusedDecoder
from registry import InputContext


class StockModel(nn.Module):
    """A transformers model with a `language_model` and an `lm_head`; a family adds `embed_multimodal`."""

    hf_class: ClassVar[type[PreTrainedModel]]

    def __init__(self, ctx: InputContext) -> None:
        super().__init__()
        self.hf = self.hf_class(ctx.model_config)
        towers = dict.fromkeys(self.hf.config.sub_configs, "sdpa")
        self.hf.set_attn_implementation({**towers, "text_config": IMPLEMENTATION})
        self.fused_decoder: FusedDecoder | None = None
        self.softcap = getattr(ctx.text_config, "final_logit_softcapping", None)

    @property
    def language_model(self) -> nn.Module:
        """The decoder without its head; a family whose class calls it otherwise says how."""
        decoder: nn.Module = self.hf.model.language_model
        return decoder

    def rename_weight(self, name: str) -> str | None:
        """A checkpoint's name of a weight to ours; None: it is not loaded."""
        return f"hf.{name}"

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embedding."""
        embeddings: nn.Module = self.hf.get_input_embeddings()
        return embeddings

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        inputs_embeds: Tensor,
        requests: Tensor | None = None,
        **adapter: Any,
    ) -> Tensor:
        """One flattened batch through the decoder: [T, hidden] -> [T, hidden], or `requests`' last tokens [S, hidden].

        The stock decoder computes all of them in either case.
        """
        if self.fused_decoder is not None and not adapter:
            return self.fused_decoder(inputs_embeds, positions, requests)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds[None], position_ids=positions[None], use_cache=False, **adapter
        )
        hidden: Tensor = outputs.last_hidden_state[0]
        return hidden if requests is None else hidden[current_context().metadata.last_rows(requests)]

    def compute_logits(self, rows: Tensor) -> Tensor:
        """[R, hidden] -> [R, vocabulary]."""
        head = self.hf.lm_head if self.fused_decoder is None else self._fused_head
        logits: Tensor = head(rows)
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def fuse_decoder(self) -> bool:
        """From now on run the decoder's fused twin, if it has one; once, after the weights are loaded."""
        self.fused_decoder = FusedDecoder.of(self.language_model)
        if self.fused_decoder is None:
            return False
        self._fused_head = Linear(self.hf.lm_head.weight, self.hf.lm_head.bias)
        return True

    def initialize_buffers(self) -> None:
        """Give buffers that no checkpoint holds (rotary frequencies, position ids) their values."""
        _initialize_buffers(self.hf, self.hf)

    def tie_weights(self) -> None:
        """Share the embedding with the output head where the configuration says so."""
        self.hf.tie_weights()


def _initialize_buffers(module: nn.Module, owner: PreTrainedModel) -> None:
    """Each transformers model knows how to initialise its own modules, and not those of models inside it."""
    if isinstance(module, PreTrainedModel):
        owner = module
    if module._non_persistent_buffers_set:
        owner._init_weights(module)
    for child in module.children():
        _initialize_buffers(child, owner)
