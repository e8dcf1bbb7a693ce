"""A vision tower's layers with fewer operations, as twins of the stock ones that stay in their places.

One product makes queries, keys and values, the residual addition goes with the norm behind it, and layers behind the
last whose output becomes features do nothing. The matrix that the product has is shared with the module's parameters.
Hidden states that become no features are overwritten by the next: all of them together are most of an encoder's memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from executor_service.kernels.layer_norm import ADD_LAYER_NORM, LAYER_NORM
from executor_service.layers.linear import Linear
from executor_service.models.fused import pack_linears

LAYERS: Final = (CLIPEncoderLayer, SiglipEncoderLayer)
"""Norm, attention, norm and MLP, each with a residual addition. A subclass may differ, so none is taken."""


def fuse_tower(tower: nn.Module, feature_layer: int | Sequence[int]) -> None:
    """Give the layers of a loaded tower that are of a known kind their twins.

    `feature_layer` as in LLaVA's configuration: one or several of the tower's hidden states, of which the first is the
    embedding.
    """
    layers = [module for module in tower.modules() if type(module) in LAYERS]
    chosen = [feature_layer] if isinstance(feature_layer, int) else feature_layer
    kept = {one % (len(layers) + 1) for one in chosen}
    num_used = max(kept, default=0)
    for number, layer in enumerate(layers[:num_used]):
        # The first one's input is the embedding's own, and may have another order in memory.
        layer.forward = _TowerLayer(layer, overwrites=number > 0 and number not in kept)
    for layer in layers[num_used:]:
        layer.forward = _pass


def _pass(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    """What comes behind is nobody's."""
    return hidden_states


class _TowerLayer:
    """Stands in for `layer.forward`; `overwrites` its input with its output, if that may be."""

    def __init__(self, layer: Any, overwrites: bool) -> None:
        self._overwrites = overwrites
        attention, mlp = layer.self_attn, layer.mlp
        self._norms = [(norm.weight, norm.bias, norm.eps) for norm in (layer.layer_norm1, layer.layer_norm2)]
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        packed = pack_linears(projections, (attention.out_proj,), (mlp.fc1,), (mlp.fc2,))
        self._qkv, self._out, self._up, self._down = (Linear(*weights) for weights in packed)
        self._activation = mlp.activation_fn
        self._head_dim, self._scale = attention.head_dim, attention.scale
        device = layer.layer_norm1.weight.device.type
        self._layer_norm, self._add_layer_norm = LAYER_NORM.direct(device), ADD_LAYER_NORM.direct(device)

    def __call__(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
        """[N, S, hidden] -> [N, S, hidden]."""
        if attention_mask is not None:
            raise ValueError("a vision tower's tokens all see each other: its layers take no mask")
        before_attention, before_mlp = self._norms
        attended = self._attend(self._layer_norm(hidden_states, *before_attention))
        total, normal = self._add_layer_norm(self._out.product(attended), hidden_states, *before_mlp)
        result = hidden_states if self._overwrites else total
        return torch.add(total, self._down.product(self._activation(self._up.product(normal))), out=result)

    def _attend(self, x: Tensor) -> Tensor:
        heads = self._qkv.product(x).unflatten(-1, (3, -1, self._head_dim))
        query, key, value = heads.transpose(1, 3).unbind(2)
        attended = F.scaled_dot_product_attention(query, key, value, scale=self._scale)
        return attended.transpose(1, 2).flatten(2)
