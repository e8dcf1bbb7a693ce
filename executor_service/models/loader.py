"""Weights from an ordinary Hugging Face checkpoint directory, straight to the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from executor_service.models.protocol import check_model_class, check_required_keywords, load_model_class
from executor_service.models.weights import Progress, WeightReader
from registry.errors import CheckpointError
from registry.family import ModelFamily


def load_model(
    family: ModelFamily, tensor_names: tuple[str, ...], device: torch.device, dtype: torch.dtype, progress: Progress,
    reader: WeightReader | None = None,
) -> nn.Module:  # fmt: skip
    """Build the family's model on the meta device and give every parameter its weights.

    TypeError if the class does not fit the model protocol; CheckpointError names missing, unknown or
    misshapen weights. `reader` may have begun to read them already.
    """
    model = build_model(family, tensor_names, device, dtype)
    reader = reader or WeightReader(family.ctx.model_dir, device)
    with contextlib.closing(reader):
        missing = _assign_weights(model, reader.tensors(progress), family.ctx.model_dir, dtype)
    _finish(model, missing)
    return model.eval().requires_grad_(False)


def build_model(
    family: ModelFamily, tensor_names: tuple[str, ...], device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """The family's model with its parameters still on the meta device, and its buffers on `device`."""
    cls = load_model_class(family)
    check_model_class(cls, tensor_names)
    if family.has_all_layouts:
        check_required_keywords(cls, tensor_names)
    model = _build_on_meta(cls, family, dtype)
    _materialize_buffers(model, device)
    return model


def _build_on_meta(cls: type[nn.Module], family: ModelFamily, dtype: torch.dtype) -> nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return cls(family.ctx)
    finally:
        torch.set_default_dtype(before)


def _assign_weights(
    model: nn.Module, weights: Iterator[tuple[str, Tensor]], model_dir: Path, dtype: torch.dtype
) -> set[str]:
    """Give the model every weight that it knows; returns the names no file had."""
    rename: Callable[[str], str | None] = getattr(model, "rename_weight", lambda name: name)
    expected = dict(model.named_parameters(remove_duplicate=False)) | dict(_persistent_buffers(model))
    missing, unknown = set(expected), []
    for source, tensor in weights:
        if (name := rename(source)) is None:
            continue
        if name not in expected:
            unknown.append(source)
            continue
        _check_shape(source, tensor, expected[name])
        _set_tensor(model, name, tensor.to(dtype) if tensor.is_floating_point() else tensor)
        missing.discard(name)
    if unknown:
        raise CheckpointError(f"{model_dir} has weights the model does not know: {_some(unknown)}")
    return missing


def _check_shape(name: str, tensor: Tensor, expected: Tensor) -> None:
    if tensor.shape != expected.shape:
        raise CheckpointError(
            f"weight {name} has shape {list(tensor.shape)}, the configuration asks for {list(expected.shape)}"
        )


def _set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    transient = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    return ((name, buffer) for name, buffer in model.named_buffers() if name not in transient)


def _materialize_buffers(model: nn.Module, device: torch.device) -> None:
    """Give buffers memory and, where no checkpoint holds them, their values.

    This comes before the weights: transformers initialises a module as a whole, and what it does to
    parameters that are still on meta is lost.
    """
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)
    _call_if_present(model, "initialize_buffers")


def _finish(model: nn.Module, missing: set[str]) -> None:
    """Tie weights and make sure that nothing was left out."""
    _call_if_present(model, "tie_weights")
    left = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    left |= missing & {name for name, _ in model.named_buffers()}
    if left:
        raise CheckpointError(f"the checkpoint lacks weights: {_some(sorted(left))}")


def _call_if_present(model: Any, method: str) -> None:
    if callable(function := getattr(model, method, None)):
        function()


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
