"""The model that is tried: the checkpoint's own weights, or a tiny random copy of its configuration."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from executor_service.checks.random_weights import initialize
from executor_service.checks.reference import load_reference, quiet, reference_class
from executor_service.checks.tiny import tiny_config
from executor_service.engine.memory import available_bytes
from executor_service.models.loader import build_model, load_model
from registry.checks import Findings, SkippedStageError, Subject
from registry.checks.mapper import lay_out
from registry.context import InputContext
from registry.family import ModelFamily
from registry.layout import ItemLayout
from registry.media import MediaInfo

CPU: Final = torch.device("cpu")
SMALL: Final = 1 << 26
"""Parameters up to which a model runs in float64."""
TINY: Final = 1 << 22
"""Parameters up to which a model is quicker on one thread: on more, the threads wait for each other."""

TOLERANCES: Final = {torch.float64: 1e-6, torch.float32: 2e-3}
"""Largest difference of two logits or features, in parts of the largest one."""


@dataclass(frozen=True)
class Trial:
    """A model and the family bound to its configuration; `load_reference` is None where transformers has no such."""

    family: ModelFamily
    model: nn.Module
    dtype: torch.dtype
    weights: str
    load_reference: Callable[[], PreTrainedModel] | None

    @property
    def model_name(self) -> str:
        """The model's class."""
        return type(self.model).__name__

    def tolerance(self, values: Tensor) -> float:
        """Largest difference from these values that rounding explains."""
        return TOLERANCES[self.dtype] * max(1.0, float(values.abs().max()))


@contextlib.contextmanager
def suitable_threads(model: nn.Module) -> Iterator[None]:
    """One thread for a tiny model, as many as there are for a larger one."""
    before = torch.get_num_threads()
    if sum(parameter.numel() for parameter in model.parameters()) <= TINY:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Trials:
    """The subject's trial, made once, and the items it is tried with."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._probes: dict[str, list[tuple[MediaInfo, ItemLayout]]] = {}

    @cached_property
    def trial(self) -> Trial:
        """With the checkpoint's weights if they are there and fit into memory."""
        dtype, reason = self._dtype_of_weights()
        if dtype is None:
            return _random_trial(self.subject.family, self.tensor_names, reason)
        return _checkpoint_trial(self.subject.family, self.tensor_names, dtype)

    @cached_property
    def tensor_names(self) -> tuple[str, ...]:
        """Every tensor and constant that a layout of the family names."""
        layouts = [layout for modality in self.subject.layouts for _, layout in self.probes(modality)]
        return tuple(dict.fromkeys(name for layout in layouts for name in (*layout.tensors, *layout.constants)))

    def probes(self, modality: str) -> list[tuple[MediaInfo, ItemLayout]]:
        """Items the family takes, with their layouts."""
        if modality not in self._probes:
            self._probes[modality] = lay_out(self.subject, modality, Findings())
        return self._probes[modality]

    def _dtype_of_weights(self) -> tuple[torch.dtype | None, str]:
        """The dtype to run the checkpoint's weights in, or None and why they are left aside."""
        files = list(self.subject.model_dir.glob("*.safetensors"))
        if not files:
            return None, "no weights"
        stored = getattr(self.subject.ctx.model_config, "dtype", None) or torch.float32
        num_parameters = sum(file.stat().st_size for file in files) // stored.itemsize
        dtype = torch.float64 if num_parameters <= SMALL else torch.float32
        needed, free = 2 * num_parameters * dtype.itemsize, available_bytes()
        if needed > 0.9 * free:
            return None, f"two copies of the weights need {needed >> 20:,} MiB, {free >> 20:,} MiB are free"
        return dtype, ""


def _checkpoint_trial(family: ModelFamily, names: tuple[str, ...], dtype: torch.dtype) -> Trial:
    model = load_model(family, names, CPU, dtype, lambda done, total: None)
    cls, model_dir = reference_class(family.ctx), family.ctx.model_dir
    reference = None if cls is None else functools.cache(lambda: load_reference(cls, model_dir, dtype))
    return Trial(family, model, dtype, "the checkpoint's weights", reference)


def _random_trial(family: ModelFamily, names: tuple[str, ...], reason: str) -> Trial:
    """The weights go through a checkpoint directory, so that their names are tried too."""
    ctx = dataclasses.replace(family.ctx, model_config=tiny_config(family.ctx.model_config))
    tiny = ModelFamily(family.cls, ctx)
    weights = f"tiny random weights ({reason})"
    cls = reference_class(ctx)
    if cls is None:
        return Trial(tiny, _random_model(tiny, names), torch.float64, weights, None)
    with tempfile.TemporaryDirectory() as folder:
        _write_random_weights(cls, ctx, Path(folder))
        written = ModelFamily(family.cls, dataclasses.replace(ctx, model_dir=Path(folder)))
        model = load_model(written, names, CPU, torch.float64, lambda done, total: None)
        reference = load_reference(cls, Path(folder), torch.float64)
    return Trial(tiny, model, torch.float64, weights, lambda: reference)


def _write_random_weights(cls: type[PreTrainedModel], ctx: InputContext, folder: Path) -> None:
    try:
        model: Any = cls(ctx.model_config)
    except Exception as error:
        raise SkippedStageError(f"transformers cannot make a tiny copy of the configuration: {error}") from error
    initialize(model, torch.float32, CPU)
    model.tie_weights()
    with quiet():
        model.save_pretrained(folder)


def _random_model(family: ModelFamily, names: tuple[str, ...]) -> nn.Module:
    """A model that only the family knows: random parameters under its own names."""
    model = build_model(family, names, CPU, torch.float64)
    initialize(model, torch.float64, CPU)
    if callable(tie := getattr(model, "tie_weights", None)):
        tie()
    return model.eval()
