"""Random bidirectional spans over a batch of chunks, as attention is told of them."""

from __future__ import annotations

import random
from collections.abc import Iterable

import torch
from torch import Tensor

LENGTHS = (1, 2, 5, 17, 64, 100, 130, 300)


def visible_ends(chunks: Iterable[tuple[int, int]], seed: int) -> Tensor:
    """Int32 [T] for chunks of (new, cached) tokens each: spans of all lengths, between them tokens of none.

    A chunk may begin within a span, as behind a prefix that was cached, and ends with one's end or behind it.
    """
    generator = random.Random(seed)
    ends: list[int] = []
    for new, cached in chunks:
        place, length = cached, cached + new
        while place < length:
            end = min(place + generator.choice(LENGTHS), length)
            ends += [end] * (end - place) if generator.random() < 0.5 else range(place + 1, end + 1)
            place = end
    return torch.tensor(ends, dtype=torch.int32)
