"""Activations of transformers' modules that are several operations there and one here."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.activations import QuickGELUActivation

from executor_service.kernels.quick_gelu import quick_gelu


class QuickGelu(nn.Module):
    """transformers' `QuickGELUActivation`, rounded as it is."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same."""
        return quick_gelu(x)


def fuse_activations(model: nn.Module) -> None:
    """Replace those that have a twin here, wherever they are in the model."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is QuickGELUActivation:
                setattr(module, name, QuickGelu())
