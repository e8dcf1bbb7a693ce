"""Steps that only decode, as CUDA graphs: one launch instead of hundreds.

A graph is captured per batch size; a step takes the smallest that holds it, with rows of nothing behind its own. All
share one memory pool, whose size the largest decides, so that one is captured first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

Decode = Callable[[], Tensor]
"""Runs the model for a padded batch whose inputs are in place: logits [rows, vocabulary]."""
_SMALL: Final = (1, 2, 4, 8)
_STEPS: Final = ((16, 128, 16), (128, 512, 32), (512, 4096, 128))
"""From, up to, by: padding costs little where a step reads all weights anyway."""


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture, largest first."""
    sizes = {*_SMALL, *(size for first, last, step in _STEPS for size in range(first, last + 1, step))}
    return sorted({*(size for size in sizes if size < max_num_seqs), max_num_seqs}, reverse=True)


def size_holding(num_requests: int, sizes: Sequence[int]) -> int | None:
    """The smallest of ascending sizes that holds so many requests."""
    return next((size for size in sizes if size >= num_requests), None)


class DecodeGraphs:
    """Captured decode steps. `prepare(size)` puts inputs of nothing in place and returns what is to be captured."""

    def __init__(
        self, sizes: Sequence[int], prepare: Callable[[int], Decode], report: Callable[[int, int], None]
    ) -> None:
        self._sizes = sorted(sizes)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()
        self._logits: Tensor | None = None
        for done, size in enumerate(reversed(self._sizes), 1):
            self._graphs[size] = self._capture(size, prepare(size))
            report(done, len(sizes))

    def size_for(self, num_requests: int) -> int | None:
        """The smallest captured size that holds so many requests."""
        return size_holding(num_requests, self._sizes)

    def replay(self, size: int) -> Tensor:
        """Run the step whose inputs are in place: logits [size, vocabulary], valid until the next replay."""
        assert self._logits is not None
        self._graphs[size].replay()
        return self._logits[:size]

    def _capture(self, size: int, decode: Decode) -> torch.cuda.CUDAGraph:
        """Once without a graph, since libraries choose and load their kernels at a first call; then into the graph."""
        first = decode()
        if self._logits is None:
            self._logits = torch.empty_like(first)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool)
            self._logits[:size].copy_(decode())
            graph.capture_end()
        return graph
