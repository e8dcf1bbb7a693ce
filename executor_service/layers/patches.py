"""A vision tower's first layer as a matrix product over rows that one kernel makes of uint8 tiles."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Self, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

from executor_service.kernels.image_patches import image_patches
from executor_service.kernels.normalize import normalize

TOWERS: Final = (CLIPVisionEmbeddings, SiglipVisionEmbeddings)
"""Embeddings whose `patch_embedding` is a convolution over pixel values that nothing else looks at."""
COLUMNS_MULTIPLE: Final = 64
"""Of the product's rows: cuBLAS is three times as fast with a multiple of 8 as with CLIP's own 588, and faster still
with whole blocks of its kernels, by more than the wider rows take to write."""
Method = TypeVar("Method", bound=Callable[..., Any])


@dataclass(frozen=True)
class Levels:
    """uint8 `tensor` that is not normalised yet: `table` (float32 [C, 256]) has what a level of a channel becomes."""

    tensor: Tensor
    table: Tensor
    channel_axis: int

    def normalized(self, dtype: torch.dtype) -> Tensor:
        """What a model gets that does not take levels."""
        return normalize(self.tensor, self.table, self.channel_axis, dtype)


def takes_levels(embed_multimodal: Method) -> Method:
    """Mark a model's `embed_multimodal`: tensors that are to be normalised come as `Levels`.

    The mark is the method's, so a subclass with a method of its own gets normalised tensors unless it says so too.
    """
    embed_multimodal.takes_levels = True  # type: ignore[attr-defined]
    return embed_multimodal


class PatchProduct(nn.Module):
    """In the place of a patch convolution: itself on pixel values, a product of patches on what `pixels_of` gave.

    The weight stays the convolution's, in the memory of the product's matrix [out, columns].
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        out, *kernel = convolution.weight.shape
        length = math.prod(kernel)
        self.patch = kernel[-1]
        self.matrix = convolution.weight.new_zeros(out, -(-length // COLUMNS_MULTIPLE) * COLUMNS_MULTIPLE)
        self.matrix[:, :length] = convolution.weight.flatten(1)
        self.weight = nn.Parameter(self.matrix[:, :length].unflatten(1, kernel), requires_grad=False)
        self.bias = convolution.bias
        self._rows = self.matrix
        self._nothing = torch.full((), math.nan, dtype=self.matrix.dtype, device=self.matrix.device)

    @classmethod
    def install(cls, tower: nn.Module) -> Self | None:
        """Replace the convolution of a loaded tower; None where there is none of a kind that is known."""
        embeddings: Any = next((module for module in tower.modules() if type(module) in TOWERS), None)
        if embeddings is None:
            return None
        embeddings.patch_embedding = cls(embeddings.patch_embedding)
        product: Self = embeddings.patch_embedding
        return product

    def pixels_of(self, tiles: Tensor, table: Tensor) -> Tensor:
        """uint8 `tiles` [N, C, H, W] -> a stand-in for their pixel values, without memory, to give to the tower next.

        Whatever else looks at its elements sees NaN.
        """
        self._rows = image_patches(tiles, table, self.patch, self.matrix.shape[1], self.matrix.dtype)
        return self._nothing.expand(tiles.shape)

    def holds(self, pixel_values: Tensor) -> bool:
        """Whether these are a stand-in for patches."""
        return pixel_values.data_ptr() == self._nothing.data_ptr()

    def take_rows(self) -> Tensor:
        """The patches of the last stand-in, which are then nobody's."""
        rows, self._rows = self._rows, self.matrix
        return rows

    def give_rows(self, rows: Tensor) -> None:
        """Patches for the next run of the tower over a stand-in."""
        self._rows = rows

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, out, H // patch, W // patch]."""
        if not self.holds(pixel_values):
            return F.conv2d(pixel_values, self.weight, self.bias, stride=self.patch)
        num_tiles, _, height, width = pixel_values.shape
        product = F.linear(self.take_rows(), self.matrix, self.bias)
        return product.view(num_tiles, height // self.patch, width // self.patch, -1).permute(0, 3, 1, 2)
