"""A vision tower over a few tiles as CUDA graphs: alone, it is hundreds of launches for a millisecond of work.

Only what is captured while `capturing` replays afterwards; everything else goes through the tower as it is, but without
cuDNN's attention. That is the fastest on Hopper, by 6 % of the tower's time, and makes a plan for every number of tiles
that it has not seen: 40 ms of the host, in which the GPU has nothing to do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from executor_service.layers.patches import PatchProduct

MAX_TILES: Final = 8
"""With more, the GPU is longer at it than the host."""
_WITHOUT_PLANS: Final = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class _TowerGraph:
    """A captured run: the patches it reads, and what it leaves behind."""

    graph: torch.cuda.CUDAGraph
    rows: Tensor
    outputs: Any


class TowerGraphs:
    """Stands in for `tower.forward`, for pixel values that `product` holds as patches."""

    def __init__(self, tower: nn.Module, product: PatchProduct) -> None:
        self._forward = tower.forward
        self._product = product
        self._graphs: dict[str, _TowerGraph] = {}
        self._captures = False
        tower.forward = self

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """Inside the block, what has not been seen is captured."""
        self._captures = True
        try:
            yield
        finally:
            self._captures = False

    def __call__(self, pixel_values: Tensor, **options: Any) -> Any:
        """What the tower returns; valid until the next call where it came from a graph."""
        if not self._product.holds(pixel_values) or not pixel_values.is_cuda:
            return self._forward(pixel_values, **options)
        key = f"{tuple(pixel_values.shape)} {sorted(options.items())}"
        if key not in self._graphs:
            if not self._captures or len(pixel_values) > MAX_TILES:
                with sdpa_kernel(_WITHOUT_PLANS):
                    return self._forward(pixel_values, **options)
            self._graphs[key] = self._capture(pixel_values, options)
        found, rows = self._graphs[key], self._product.take_rows()
        found.rows.copy_(rows)
        found.graph.replay()
        return type(found.outputs)(**found.outputs)

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        """One for all: a library's workspace, 32 MiB, is a stream's."""
        return torch.cuda.Stream()

    @cached_property
    def _pool(self) -> Any:
        """One for all: they never run at once, and what one leaves behind is not free for another."""
        return torch.cuda.graph_pool_handle()

    def _capture(self, pixel_values: Tensor, options: dict[str, Any]) -> _TowerGraph:
        given = self._product.take_rows()
        rows = given.clone()
        self._product.give_rows(rows)
        self._forward(pixel_values, **options)  # libraries choose their kernels at a first call
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        self._product.give_rows(rows)
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool)
            outputs = self._forward(pixel_values, **options)
            graph.capture_end()
        self._product.give_rows(given)
        return _TowerGraph(graph, rows, outputs)
