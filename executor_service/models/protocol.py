"""What the executor asks of a model, and the checks that say what is missing before anything runs."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from inspect import Parameter
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor, nn

from executor_service.layers.attention import Attention
from registry.family import ModelFamily


@runtime_checkable
class ExecutorModel(Protocol):
    """The model protocol. A model is an `nn.Module` made by `cls(ctx)` on the meta device.

    Optional: `rename_weight(name) -> name | None` for checkpoint names, `initialize_buffers()` for buffers that no
    checkpoint holds, `tie_weights()`, `fuse_decoder() -> bool` to run faster than its stock modules from then on
    (False: it cannot), `tower_graphs` whose `capturing` block captures runs of a few tiles, and
    `positions(prompt_token_ids, items) -> (positions, decode_delta)` where positions are not simply counted: int64 [n]
    or [axes, n], and what is added to the number of an output token; and `bidirectional_spans(items) -> [(begin, end)]`
    where tokens also see later ones, all those of their span. A span lies within one item's placeholder range, a
    layer's sliding window holds in it as elsewhere, and it is computed in one step.
    """

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding: ids [T] -> [T, hidden]."""

    def embed_multimodal(self, **tensors: Any) -> list[Tensor]:
        """Features per item, each [num_features, width].

        Its parameter names are the layout's tensors and constants; each is a list with one tensor per
        item (uint8 already normalised, but for a method marked with `layers.patches.takes_levels`, which gets
        `Levels`). Constants are on the CPU: whoever asked a GPU for them would wait for it.
        """

    def forward(self, input_ids: Tensor, positions: Tensor, inputs_embeds: Tensor) -> Tensor:
        """[T], [T] or [axes, T], [T, hidden] -> hidden states [T, hidden]; `inputs_embeds` may be overwritten.

        With a parameter `requests` it is told who in the batch is asked about, int64 [S], and returns hidden states of
        their last tokens alone, [S, hidden]; None: of all tokens.
        """

    def compute_logits(self, rows: Tensor) -> Tensor:
        """Hidden states [R, hidden] -> logits [R, vocabulary]."""


@dataclass(frozen=True)
class KVGeometry:
    """Shape of the KV cache: the same for every layer."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


def load_model_class(family: ModelFamily) -> type[nn.Module]:
    """The family's executor model class; TypeError naming what does not fit."""
    if isinstance(family.cls, type) and issubclass(family.cls, nn.Module):
        return cast(type[nn.Module], family.cls)
    name = family.cls.executor_model
    if not isinstance(name, str) or ":" not in name:
        raise TypeError(f'{family.name}: executor_model must name a class as "package.module:Class", it is {name!r}')
    module_name, _, class_name = name.partition(":")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except Exception as error:  # it is somebody's program: anything may come out
        cause = f"{type(error).__name__}: {error}"
        raise TypeError(f"{family.name}: cannot load the executor model {name!r}: {cause}") from error
    return cast(type[nn.Module], cls)


def check_model_class(cls: type, tensor_names: Iterable[str]) -> None:
    """TypeError naming the first method or keyword of the protocol that `cls` lacks."""
    for method in ("get_input_embeddings", "embed_multimodal", "forward", "compute_logits"):
        if not callable(getattr(cls, method, None)):
            raise TypeError(f"{cls.__name__} lacks the method {method} of the executor model protocol")
    spans = getattr(cls, "bidirectional_spans", None)
    if spans is not None and not callable(spans):
        raise TypeError(f"{cls.__name__}.bidirectional_spans is to be a method: (items) -> [(begin, end)]")
    parameters = _embed_parameters(cls)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    accepted = {parameter.name for parameter in parameters}
    if missing := set(tensor_names) - accepted:
        raise TypeError(
            f"{cls.__name__}.embed_multimodal does not take {', '.join(sorted(missing))}, which the layout emits; "
            f"it takes {', '.join(sorted(accepted))}"
        )


def check_required_keywords(cls: type, tensor_names: Iterable[str]) -> None:
    """TypeError naming the keywords without which `embed_multimodal` cannot be called and that no layout emits."""
    named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_ONLY)
    required = {p.name for p in _embed_parameters(cls) if p.default is Parameter.empty and p.kind in named}
    if missing := required - set(tensor_names):
        raise TypeError(
            f"{cls.__name__}.embed_multimodal requires {', '.join(sorted(missing))}, which no layout emits; "
            f"the layouts emit {', '.join(sorted(tensor_names))}"
        )


def _embed_parameters(cls: Any) -> list[Parameter]:
    """Those of `embed_multimodal`, without `self`."""
    return [p for p in inspect.signature(cls.embed_multimodal).parameters.values() if p.name != "self"]


def takes_requests(model: Any) -> bool:
    """Whether `forward` would rather know whose last tokens are asked about."""
    return "requests" in inspect.signature(model.forward).parameters


def kv_geometry(model: nn.Module, text_config: Any) -> KVGeometry:
    """From the model's `Attention` modules if it has any, else from the language model's configuration."""
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    if layers:
        shapes = {(layer.num_kv_heads, layer.head_dim) for layer in layers}
        if len(shapes) != 1:
            raise TypeError(f"{type(model).__name__}: layers with different KV shapes are not supported: {shapes}")
        (num_kv_heads, head_dim) = shapes.pop()
        return KVGeometry(max(layer.layer_index for layer in layers) + 1, num_kv_heads, head_dim)
    num_heads = text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // num_heads
    num_kv_heads = getattr(text_config, "num_key_value_heads", None) or num_heads
    return KVGeometry(text_config.num_hidden_layers, num_kv_heads, head_dim)
