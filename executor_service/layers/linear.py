"""Matrix products of the fused path: ours where rows are few and weights stream, the library's where they are many."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from executor_service.kernels.silu_mul import SILU_MUL
from executor_service.kernels.small_linear import SMALL_LINEAR, SMALL_LINEAR_SILU_MUL, takes


@dataclass(frozen=True)
class Linear:
    """`weight` [out, in], `bias` [out] or None. Inputs are [rows, in]."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, out]."""
        if self.streams(x):
            return self._small(x, None)
        return F.linear(x, self.weight, self.bias)

    def streams(self, x: Tensor) -> bool:
        """Whether rows are so few that the time is the weights'."""
        return takes(x.shape[0], self.weight)

    def added_to(self, x: Tensor, residual: Tensor) -> Tensor:
        """`residual` [rows, out] + product, rounded once. It may be the same tensor, and is nobody else's afterwards.

        The product adds where it stores, which takes no pass over memory but for a bias.
        """
        if self.streams(x):
            return self._small(x, residual)
        total = residual.addmm_(x, self.weight.t())
        return total if self.bias is None else total.add_(self.bias)

    def _small(self, x: Tensor, residual: Tensor | None) -> Tensor:
        result: Tensor = SMALL_LINEAR.direct(x.device.type)(x, self.weight, self.bias, residual)
        return result


@dataclass(frozen=True)
class GatedLinear(Linear):
    """Gate and up matrices as one, the gate's rows first: `silu(gate) * up`. Without a bias it streams too."""

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, out / 2]."""
        if self.bias is None and self.streams(x):
            result: Tensor = SMALL_LINEAR_SILU_MUL.direct(x.device.type)(x, self.weight)
            return result
        product: Tensor = SILU_MUL.direct(x.device.type)(F.linear(x, self.weight, self.bias))
        return product
