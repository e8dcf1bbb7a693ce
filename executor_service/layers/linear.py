"""Matrix products of the fused path: ours where rows are few and weights stream, the library's where they are many.

On CPU, weights in float32 are kept a second time, in the order in which oneDNN multiplies: 16 rows then take a third
to almost a half less time than in the plain order, hundreds a tenth. One row and two take the plain order, by a product
that MKL has a fast kernel for (docs/notes/cpu.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from executor_service.kernels.silu_mul import SILU_MUL
from executor_service.kernels.small_linear import SMALL_LINEAR, SMALL_LINEAR_SILU_MUL, takes

_PACKED_ROWS: Final = 512
"""oneDNN packs for so many. Its order for one row is no faster with one, and as slow as the plain one with more."""


@dataclass(frozen=True)
class Linear:
    """`weight` [out, in], which stays as it is, `bias` [out] or None. Inputs are [rows, in]."""

    weight: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        """The second order is made with the first, before anybody measures what a step takes."""
        _ = self._packed

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, out]."""
        if self.streams(x):
            return self._small(x, None)
        return self.product(x)

    def streams(self, x: Tensor) -> bool:
        """Whether rows are so few that the time is the weights'."""
        return self._packed is None and takes(x.shape[0], self.weight)

    def added_to(self, x: Tensor, residual: Tensor) -> Tensor:
        """`residual` [rows, out] + product. It may be the same tensor, and is nobody else's afterwards.

        The product adds where it stores, which takes no pass over memory but for a bias; oneDNN's cannot.
        """
        if self.streams(x):
            return self._small(x, residual)
        if self._packed is not None:
            return residual.add_(self.product(x))
        total = residual.addmm_(x, self.weight.t())
        return total if self.bias is None else total.add_(self.bias)

    def _small(self, x: Tensor, residual: Tensor | None) -> Tensor:
        result: Tensor = SMALL_LINEAR.direct(x.device.type)(x, self.weight, self.bias, residual)
        return result

    def product(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], as a library makes it."""
        if self._packed is None:
            return F.linear(x, self.weight, self.bias)
        if x.numel() <= 2 * x.shape[-1] and x.dim() == 2:
            return self._pair(x)
        result: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self._packed, self.bias, "none", [], "")
        return result

    def _pair(self, x: Tensor) -> Tensor:
        """The weight times two columns, of which the second may be there for MKL's sake alone.

        With one it takes a kernel that reads at half the rate.
        """
        rows = x.shape[0]
        product = torch.mm(self.weight, (x if rows == 2 else torch.cat((x, x))).t()).t()[:rows]
        return product if self.bias is None else product.add_(self.bias)

    @cached_property
    def _packed(self) -> Tensor | None:
        """The weight in oneDNN's order; None where the library takes it as it is."""
        weight = self.weight
        if weight.is_cuda or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
            return None
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_ROWS)
        return packed


@dataclass(frozen=True)
class GatedLinear(Linear):
    """Gate and up matrices as one, the gate's rows first: `silu(gate) * up`. Without a bias it streams too."""

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, out / 2]."""
        if self.bias is None and self.streams(x):
            result: Tensor = SMALL_LINEAR_SILU_MUL.direct(x.device.type)(x, self.weight)
            return result
        product: Tensor = SILU_MUL.direct(x.device.type)(self.product(x))
        return product
