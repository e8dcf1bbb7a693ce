"""Transformers' own model and processor: what the executor's forward pass is compared with."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from registry import InputContext, MediaItem

MODALITY_TYPES: Final = {"image": 1, "video": 2, "audio": 3}
"""What transformers' processors mark an item's tokens with; those of text have 0."""
TYPE_ARGUMENTS: Final = ("mm_token_type_ids", "token_type_ids")
"""What models of transformers that look at these marks call them: to let a picture's tokens see each other, say."""


def reference_class(ctx: InputContext) -> type[PreTrainedModel] | None:
    """Transformers' class of the checkpoint's architecture, None if it does not know it."""
    cls: Any = getattr(transformers, ctx.architecture, None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        return None
    config_class: Any = getattr(cls, "config_class", None)
    return cls if config_class and isinstance(ctx.model_config, config_class) else None


def load_reference(cls: type[PreTrainedModel], model_dir: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model with the directory's weights."""
    with quiet():
        model: PreTrainedModel = cls.from_pretrained(model_dir, dtype=dtype, local_files_only=True)
    return model.eval()


@torch.inference_mode()
def reference_logits(
    model: PreTrainedModel, ctx: InputContext, token_ids: Sequence[int], types: Tensor, items: Sequence[MediaItem]
) -> Tensor:
    """Logits [T, vocabulary] of the expanded ids with the items through transformers' own image processor.

    `types` [T] has the ids' MODALITY_TYPES.
    """
    inputs: dict[str, Any] = {}
    if items:
        pictures = [item.data for item in items]
        inputs = dict(ctx.image_processor(images=pictures, return_tensors="pt"))
    moved = {
        name: value.to(model.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    moved |= _type_arguments(model, types)
    ids = torch.tensor([list(token_ids)])
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **moved).logits[0]
    return logits


@torch.inference_mode()
def decoder_logits(model: PreTrainedModel, token_ids: Tensor, types: Tensor, features: Tensor) -> Tensor:
    """Logits [T, vocabulary] where `features` [F, hidden] stand at the F places whose `types` [T] are not text's.

    For what is no picture: how transformers wants it passed is the model's own affair.
    """
    is_feature = types > 0
    embeddings = model.get_input_embeddings()(token_ids.masked_fill(is_feature, 0))
    embeddings[is_feature] = features.to(embeddings.dtype)
    attended, marks = torch.ones((1, len(token_ids)), dtype=torch.int64), _type_arguments(model, types)
    logits: Tensor = model(inputs_embeds=embeddings[None], attention_mask=attended, use_cache=False, **marks).logits[0]
    return logits


def _type_arguments(model: PreTrainedModel, types: Tensor) -> dict[str, Tensor]:
    """The marks under the name by which `forward` takes them; most models do not."""
    taken = inspect.signature(model.forward).parameters
    name = next((name for name in TYPE_ARGUMENTS if name in taken), None)
    return {} if name is None else {name: types[None]}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of transformers' own inside the block."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
