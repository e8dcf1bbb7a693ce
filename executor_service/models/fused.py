"""The fused path: our own loop over a Llama-shaped decoder, with fewer and larger operations than the stock one.

Reads weights and configuration from transformers' module and shares its memory: query, key and value matrices become
one, gate and up matrices another, each layer's lie together, and the module's own parameters are views of them. So the
stock path stays its twin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final, Self

import torch
from torch import Tensor, nn
from transformers import LlamaModel, MistralModel, Qwen2Model

from executor_service.kernels.rms_norm import RMS_NORM
from executor_service.kernels.rotary_write_kv import ROTARY_WRITE_KV
from executor_service.layers.attention import paged_attention
from executor_service.layers.context import AttentionMetadata, KVCache, current_context
from executor_service.layers.linear import GatedLinear, Linear

WINDOWS: Final[dict[type, Callable[[Any], int | None]]] = {
    LlamaModel: lambda attention: None,
    MistralModel: lambda attention: attention.config.sliding_window,
    Qwen2Model: lambda attention: attention.sliding_window,
}
"""Decoders whose layers are norm, rotary attention, norm and SiLU-gated MLP, and where each has its sliding window.

A subclass may differ, so none is taken.
"""
MAX_MLP_ROWS: Final = 4096
"""At once: what gate and up make of more takes memory that the KV cache could have, and is computed no faster."""
PACK_ALIGNMENT: Final = 256
"""Elements: matrices that lie together begin where the allocator would have them begin, at multiples of 512 bytes
where an element has two."""


@dataclass(frozen=True)
class _Norm:
    weight: Tensor
    epsilon: float


@dataclass(frozen=True)
class _Layer:
    """One layer's weights; `sliding_window` 0: none."""

    attention_norm: _Norm
    qkv: Linear
    output: Linear
    mlp_norm: _Norm
    gate_up: GatedLinear
    down: Linear
    scale: float
    sliding_window: int

    def keys_and_values(self) -> Linear:
        """`qkv` without the queries."""
        first, bias = self.output.weight.shape[1], self.qkv.bias
        return Linear(self.qkv.weight[first:], None if bias is None else bias[first:])

    def mlp_added_to(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """`residual` + MLP, as `Linear.added_to`: many rows in even slices, each added in its place."""
        num_slices = -(-len(hidden) // MAX_MLP_ROWS)
        if num_slices <= 1:
            return self.down.added_to(self.gate_up(hidden), residual)
        for rows, sums in zip(hidden.chunk(num_slices), residual.chunk(num_slices), strict=True):
            self.down.added_to(self.gate_up(rows), sums)
        return residual


class FusedDecoder:
    """Embeddings in, hidden states out, as the decoder it was made of."""

    def __init__(self, layers: Sequence[_Layer], norm: _Norm, cos_sin: Tensor) -> None:
        self._layers = layers
        self._next_norms = [*(layer.attention_norm for layer in layers[1:]), norm]
        self._last_keys_and_values = layers[-1].keys_and_values()
        self._cos_sin = cos_sin
        device = norm.weight.device.type
        self._rms_norm, self._rotary_write_kv = RMS_NORM.direct(device), ROTARY_WRITE_KV.direct(device)

    @classmethod
    def of(cls, decoder: nn.Module) -> Self | None:
        """The twin of a loaded decoder, which goes on working; None for one of another shape."""
        model: Any = decoder
        if type(model) not in WINDOWS or model.config.hidden_act != "silu":
            return None
        window_of = WINDOWS[type(model)]
        layers = [_fuse(layer, window_of) for layer in model.layers[: model.config.num_hidden_layers]]
        return cls(layers, _norm(model.norm), rotary_table(model))

    def __call__(self, inputs_embeds: Tensor, positions: Tensor, requests: Tensor | None = None) -> Tensor:
        """[T, hidden], [T] -> [T, hidden], or [S, hidden] of the last tokens of `requests` [S] of the batch alone.

        Then the last layer makes keys and values of all tokens, and goes on with a batch of those few. `inputs_embeds`
        are overwritten: the residual stream begins with them.
        """
        context = current_context()
        batch = context.metadata
        residual = inputs_embeds
        # One name for whatever is only the next operation's input: what is not needed any more must not be there while
        # gate and up are, which take most of a step.
        hidden = self._norm(residual, self._layers[0].attention_norm)
        for layer, cache, next_norm in zip(self._layers, context.kv_caches, self._next_norms, strict=True):
            if requests is not None and layer is self._layers[-1]:
                self._write_kv(self._last_keys_and_values(hidden), positions, cache, batch)
                rows, batch = batch.last_rows(requests), batch.of_last_tokens(requests)
                # Behind the batch's tables, which decode attention may read before the kernel just before it has ended.
                positions, residual, hidden = positions[rows], residual[rows], hidden[rows]
            hidden = self._write_kv(layer.qkv(hidden), positions, cache, batch)
            hidden = paged_attention(hidden, cache, batch, layer.scale, layer.sliding_window, 0.0)
            residual = layer.output.added_to(hidden.flatten(1), residual)
            hidden = self._norm(residual, layer.mlp_norm)
            residual = layer.mlp_added_to(hidden, residual)
            hidden = self._norm(residual, next_norm)
        return hidden

    def _write_kv(self, qkv: Tensor, positions: Tensor, cache: KVCache, batch: AttentionMetadata) -> Tensor:
        """Keys and values, rotated, to the cache; rotated queries, as many as `qkv` has."""
        query: Tensor = self._rotary_write_kv(
            qkv, positions, self._cos_sin, cache.keys, cache.values, batch.slot_mapping
        )
        return query

    def _norm(self, x: Tensor, norm: _Norm) -> Tensor:
        normal: Tensor = self._rms_norm(x, norm.weight, norm.epsilon)
        return normal


def rotary_table(model: Any) -> Tensor:
    """What a decoder's rotary embedding makes of each position, [max_positions, D]: D / 2 cosines, then as many sines.

    It covers all positions that boot lets a request have: frequencies that change beyond a length never come up.
    """
    rope = model.config.rope_parameters
    num_positions = model.config.max_position_embeddings
    if rope["rope_type"] == "longrope":
        num_positions = rope.get("original_max_position_embeddings") or num_positions
    with torch.inference_mode():
        weight: Tensor = model.norm.weight
        tables = model.rotary_emb(weight, torch.arange(num_positions, device=weight.device)[None])
        return torch.cat([table[0].chunk(2, dim=-1)[0] for table in tables], dim=-1)


def _fuse(layer: Any, window_of: Callable[[Any], int | None]) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    qkv, output, gate_up, down = pack_linears(
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    )
    return _Layer(
        _norm(layer.input_layernorm),
        Linear(*qkv),
        Linear(*output),
        _norm(layer.post_attention_layernorm),
        GatedLinear(*gate_up),
        Linear(*down),
        attention.scaling,
        window_of(attention) or 0,
    )


def _norm(module: Any) -> _Norm:
    return _Norm(module.weight, module.variance_epsilon)


@torch.no_grad()
def pack_linears(*groups: Sequence[nn.Linear]) -> list[tuple[Tensor, Tensor | None]]:
    """One matrix, and bias, of each group of linears with the same input, whose parameters become its rows.

    All matrices of a layer lie in one piece of new memory, those that are alone too. So what the checkpoint's tensors
    leave behind is a hole of the next layer's size. Matrix by matrix it is two holes between what stays, too small for
    what comes, and the allocator, which maps whole pages of 20 MiB, can give back neither of them wholly: 1 GB of a 7B
    model.
    """
    sizes = [sum(linear.weight.numel() for linear in group) for group in groups]
    begins = [0, *accumulate(-(-size // PACK_ALIGNMENT) * PACK_ALIGNMENT for size in sizes)]
    memory = groups[0][0].weight.new_empty(begins[len(groups) - 1] + sizes[-1])
    return [
        _merge(group, memory[begin : begin + size].view(-1, group[0].in_features))
        for group, begin, size in zip(groups, begins, sizes, strict=False)
    ]


def _merge(linears: Sequence[nn.Linear], weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Their matrices, one below the other in `weight`, and biases."""
    torch.cat([linear.weight for linear in linears], out=weight)
    bias = torch.cat([linear.bias for linear in linears]) if linears[0].bias is not None else None
    begin = 0
    for linear in linears:
        end = begin + linear.out_features
        linear.weight = nn.Parameter(weight[begin:end], requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias[begin:end], requires_grad=False)
        begin = end
    return weight, bias
