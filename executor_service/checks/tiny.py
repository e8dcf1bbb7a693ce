"""A configuration shrunk to a few narrow layers: the same parts in the same order, and the same pictures."""

from __future__ import annotations

import copy
from typing import Any, Final

from transformers import PreTrainedConfig

NUM_LAYERS: Final = 2
NUM_HEADS: Final = 2
INTERMEDIATE: Final = 64
NARROW_ENOUGH: Final = 128


def tiny_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy in which every part that has layers has few, and few heads; head sizes and patches stay."""
    tiny = copy.deepcopy(config)
    layer = _deepest_feature_layer(config)
    widths: dict[int, int] = {}
    parts = [part for part in _parts(tiny) if getattr(part, "num_hidden_layers", None)]
    for part in parts:
        is_text = part is tiny.get_text_config()
        _cut_layers(part, NUM_LAYERS if is_text else max(NUM_LAYERS, layer))
        _narrow(part, widths)
    for part in parts:
        for name in ("out_hidden_size", "projection_dim"):
            if getattr(part, name, None) in widths:
                setattr(part, name, widths[getattr(part, name)])
    return tiny


def _parts(config: PreTrainedConfig) -> list[Any]:
    nested = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return [config, *(part for inner in nested for part in _parts(inner))]


def _deepest_feature_layer(config: Any) -> int:
    """Layers that a tower needs for `vision_feature_layer` to exist."""
    named = getattr(config, "vision_feature_layer", None)
    layers = named if isinstance(named, list | tuple) else [named if isinstance(named, int) else -1]
    return max(layer + 1 if layer >= 0 else -layer for layer in layers)


def _cut_layers(part: Any, num_layers: int) -> None:
    part.num_hidden_layers = min(part.num_hidden_layers, num_layers)
    if getattr(part, "layer_types", None):
        part.layer_types = list(part.layer_types)[: part.num_hidden_layers]


def _narrow(part: Any, widths: dict[int, int]) -> None:
    """Fewer heads of the same size."""
    heads, hidden = getattr(part, "num_attention_heads", None), getattr(part, "hidden_size", None)
    if not heads or not hidden or hidden <= NARROW_ENOUGH:
        return
    kept = min(heads, NUM_HEADS)
    if (kv_heads := getattr(part, "num_key_value_heads", None)) is not None:
        part.num_key_value_heads = kept if kv_heads == heads else 1
    part.num_attention_heads = kept
    part.hidden_size = widths[hidden] = kept * (hidden // heads)
    if getattr(part, "intermediate_size", None):
        part.intermediate_size = min(part.intermediate_size, INTERMEDIATE)
