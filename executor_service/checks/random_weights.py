"""Random weights under which every layer, position and pixel matters to the answer."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

SEED: Final = 0
LOUDER: Final = {"q_proj": 3.0, "o_proj": 2.0}
"""With sharper queries and louder outputs a token's neighbours matter as much as the token itself."""


def initialize(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Give every parameter random values, also those that are still on the meta device."""
    generator = torch.Generator().manual_seed(SEED)
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                values = _values(module, path, name, parameter.shape, generator)
                module._parameters[name] = nn.Parameter(values.to(device, dtype), requires_grad=False)


def _values(module: nn.Module, path: str, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """By fan-in, so that no layer grows or fades; norms near 1, embeddings quieter than what is added to them."""
    noise = torch.randn(shape, generator=generator)
    if name == "bias":
        return 0.1 * noise
    if len(shape) == 1:
        return 1 + 0.1 * noise if name == "weight" else noise
    if isinstance(module, nn.Embedding):
        return 0.3 * noise
    return LOUDER.get(path.rpartition(".")[2], 1.0) * noise * shape[1:].numel() ** -0.5
