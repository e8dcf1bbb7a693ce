"""Item layouts: which tokens and tensors an item becomes, from header facts alone.

A family's layout function is the one source of truth: plan, placeholder expansion, attestation, maximum
tokens and dummy data all follow from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Final

import numpy as np

WIRE_DTYPES: Final[Mapping[str, int]] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
}
"""Bytes of one element of each dtype that may cross the wire."""


@dataclass(frozen=True, slots=True)
class Run:
    """`count` copies of one token id in a replacement; `is_feature`: each stands for one encoder feature."""

    token_id: int
    count: int
    is_feature: bool = True


@dataclass(frozen=True, slots=True)
class PlaceholderRange:
    """Where an item's replacement stands in the expanded prompt, in tokens."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        """Index of the first token after the range."""
        return self.offset + self.length


@dataclass(frozen=True)
class Normalization:
    """How uint8 elements become floats: `(value * rescale_factor - mean[c]) / std[c]`.

    `mean` and `std` have one value per channel; `channel_axis` is the tensor's channel axis. A step the
    checkpoint leaves out has the neutral value.
    """

    rescale_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channel_axis: int = 0

    @cached_property
    def table(self) -> np.ndarray:
        """The normalised value of each (channel, level): float32 [num_channels, 256].

        The order of roundings is that of `transformers.image_transforms.rescale` and `normalize`, so
        looking a level up equals their result bit for bit.
        """
        levels = (np.arange(256, dtype=np.float64) * self.rescale_factor).astype(np.float32)
        mean, std = (np.asarray(values, dtype=np.float32)[:, None] for values in (self.mean, self.std))
        return (levels - mean) / std

    def apply(self, tensor: np.ndarray) -> np.ndarray:
        """uint8 of any shape -> float32 of the same shape."""
        channels_first = np.moveaxis(tensor, self.channel_axis, 0)
        planes = [self.table[channel][plane] for channel, plane in enumerate(channels_first)]
        return np.moveaxis(np.stack(planes), 0, self.channel_axis)


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape of one item tensor; `normalization` says how the executor turns uint8 into floats."""

    dtype: str
    shape: tuple[int, ...]
    normalization: Normalization | None = None

    @property
    def num_bytes(self) -> int:
        """Size of the tensor in bytes."""
        return prod(self.shape) * WIRE_DTYPES[self.dtype]


@dataclass(frozen=True)
class ItemLayout:
    """Tokens and tensors of one item.

    `replacement` takes the placeholder's place in the prompt; `tensors` are what the input mapper emits
    and what crosses the wire; `constants` are small integer or bool arrays that follow from the header:
    each side computes them itself and they never cross the wire.
    """

    replacement: Sequence[Run]
    tensors: Mapping[str, TensorSpec]
    constants: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Feature tokens: what the encoder produces for the item."""
        return sum(run.count for run in self.replacement if run.is_feature)

    @property
    def length(self) -> int:
        """All tokens of the replacement, separators included."""
        return sum(run.count for run in self.replacement)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.num_bytes for spec in self.tensors.values())

    @cached_property
    def token_ids(self) -> list[int]:
        """The replacement, token by token."""
        return [run.token_id for run in self.replacement for _ in range(run.count)]

    @cached_property
    def feature_mask(self) -> np.ndarray:
        """Bool [length]: which tokens of the replacement stand for a feature."""
        return np.repeat([run.is_feature for run in self.replacement], [run.count for run in self.replacement])
