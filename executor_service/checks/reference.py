"""Transformers' own model and processor: what the executor's forward pass is compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from registry import InputContext, MediaItem


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
    model: PreTrainedModel, ctx: InputContext, token_ids: Sequence[int], items: Sequence[MediaItem]
) -> Tensor:
    """Logits [T, vocabulary] of the expanded ids with the items through transformers' own image processor."""
    inputs: dict[str, Any] = {}
    if items:
        pictures = [item.data for item in items]
        inputs = dict(ctx.image_processor(images=pictures, return_tensors="pt"))
    moved = {
        name: value.to(model.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    ids = torch.tensor([list(token_ids)])
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **moved).logits[0]
    return logits


@torch.inference_mode()
def decoder_logits(model: PreTrainedModel, token_ids: Tensor, is_feature: Tensor, features: Tensor) -> Tensor:
    """Logits [T, vocabulary] where `features` [F, hidden] stand at the F places of the mask `is_feature` [T].

    For what is no picture: how transformers wants it passed is the model's own affair.
    """
    embeddings = model.get_input_embeddings()(token_ids.masked_fill(is_feature, 0))
    embeddings[is_feature] = features.to(embeddings.dtype)
    attended = torch.ones((1, len(token_ids)), dtype=torch.int64)
    logits: Tensor = model(inputs_embeds=embeddings[None], attention_mask=attended, use_cache=False).logits[0]
    return logits


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
