"""linear_chain on a GPU: against float64 and against its steps, rows that do not see each other, layers in a graph."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from executor_service.kernels import linear_chain as module
from executor_service.kernels import small_linear
from executor_service.kernels.linear_chain import MOST_ROWS, linear_chain, takes
from tests.executor_service.gpu.tensors import ERRORS, SEEDS, close, poison, random

pytestmark = pytest.mark.gpu

DTYPE = torch.bfloat16
EPSILONS = (1e-5, 1e-6)
ROUNDINGS = 3
"""How much further from float64 than one op may be what so many have made one after the other."""


@pytest.fixture(scope="module", autouse=True)
def small_weights_too() -> object:
    """Else a weight has to be worth a kernel of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_linear, "_MIN_ELEMENTS", 0)
        yield


@dataclass
class Layer:
    """What a chain takes beside x and residual."""

    output: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor
    next_norm: Tensor
    qkv: Tensor | None
    qkv_bias: Tensor | None

    @classmethod
    def random(
        cls, sizes: tuple[int, int, int, int], seed: int, *, has_bias: bool, dtype: torch.dtype = DTYPE
    ) -> Layer:
        """`sizes` of what attention gives, hidden, inner, qkv (0: none)."""
        attention, hidden, inner, qkv = sizes
        seeds = itertools.count(seed)

        def weight(features: int, width: int) -> Tensor:
            return (random((features, width), torch.float32, next(seeds)) / width**0.5).to(dtype)

        def norm() -> Tensor:
            return (1 + random((hidden,), torch.float32, next(seeds)) / 4).to(dtype)

        matrices = weight(hidden, attention), weight(2 * inner, hidden), weight(hidden, inner)
        last = weight(qkv, hidden) if qkv else None
        bias = random((qkv,), dtype, next(seeds)) if qkv and has_bias else None
        layer = cls(matrices[0], norm(), matrices[1], matrices[2], norm(), last, bias)
        torch.cuda.synchronize()  # a weight is not written by the kernel just before
        return layer

    @property
    def weights(self) -> list[Tensor]:
        """That `takes` looks at."""
        return [weight for weight in (self.output, self.gate_up, self.down, self.qkv) if weight is not None]

    def __call__(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """By one kernel."""
        assert takes(len(x), *self.weights) == (torch.cuda.get_device_capability() == (9, 0))
        poison()
        return linear_chain(
            x, residual, self.output, self.mlp_norm, self.gate_up, self.down, self.next_norm, EPSILONS,
            self.qkv, self.qkv_bias,
        )  # fmt: skip

    def by_steps(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """By a kernel for each step."""
        return module._step_by_step(
            "cuda", x, residual, self.output, self.mlp_norm, self.gate_up, self.down, self.next_norm, EPSILONS,
            self.qkv, self.qkv_bias,
        )  # fmt: skip

    def exact(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """In float64, not rounded in between."""
        output, gate_up, down = self.output.double(), self.gate_up.double(), self.down.double()
        middle = residual.double() + x.double() @ output.T
        gate, up = (exact_norm(middle, self.mlp_norm, EPSILONS[0]) @ gate_up.T).chunk(2, dim=-1)
        out = middle + gate * gate.sigmoid() * up @ down.T
        normal = exact_norm(out, self.next_norm, EPSILONS[1])
        if self.qkv is None:
            return out, normal
        product = normal @ self.qkv.double().T
        return out, product if self.qkv_bias is None else product + self.qkv_bias.double()


def exact_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight.double()


def is_close(got: Tensor, expected: Tensor) -> bool:
    """`expected` float64; NaN is never close."""
    error = (got.double() - expected).norm() / expected.norm()
    return bool(error <= ROUNDINGS * ERRORS[got.dtype])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, MOST_ROWS),
    st.sampled_from([64, 256, 1000]),
    st.sampled_from([64, 144, 1008, 4096]),
    st.sampled_from([8, 200, 2816]),
    st.sampled_from([0, 96, 3072]),
    st.booleans(),
    SEEDS,
)
def test_linear_chain(rows: int, attention: int, hidden: int, inner: int, qkv: int, has_bias: bool, seed: int) -> None:
    layer = Layer.random((attention, hidden, inner, qkv), seed, has_bias=has_bias)
    x, residual = random((rows, attention), DTYPE, seed + 20), random((rows, hidden), DTYPE, seed + 21)
    for got, expected in zip(layer(x, residual), layer.exact(x, residual), strict=True):
        assert got.shape == expected.shape
        assert is_close(got, expected)


@pytest.mark.parametrize("sizes", [(4096, 4096, 11008, 12288), (4096, 4096, 14336, 6144)], ids=["llama", "mistral"])
def test_large(sizes: tuple[int, int, int, int]) -> None:
    """A decoder's own sizes: as the steps but for roundings, and the same again."""
    layer = Layer.random(sizes, 3, has_bias=False)
    x, residual = random((MOST_ROWS, sizes[0]), DTYPE, 1), random((MOST_ROWS, sizes[1]), DTYPE, 2)
    for rows in (1, 2, 7, 8, 9, 16, 17, 24, 32, 33, 48, MOST_ROWS):
        got = layer(x[:rows], residual[:rows])
        for ours, steps in zip(got, layer.by_steps(x[:rows], residual[:rows]), strict=True):
            assert (ours.double() - steps.double()).norm() <= ERRORS[DTYPE] / 2 * steps.double().norm()
            close(ours, steps.double())
        for _ in range(5):
            again = layer(x[:rows], residual[:rows])
            assert all(map(torch.equal, got, again))


def test_rows_do_not_see_each_other() -> None:
    layer = Layer.random((512, 1008, 1016, 1520), 4, has_bias=True)
    x, residual = random((MOST_ROWS, 512), DTYPE, 5), random((MOST_ROWS, 1008), DTYPE, 6)
    everything = layer(x, residual)
    for rows in (1, 5, 8, 16, 30, 40, 63):
        got = layer(x[:rows], residual[:rows])
        assert all(torch.equal(few, many[:rows]) for few, many in zip(got, everything, strict=True))
    x[1::2] = float("nan")
    got = layer(x, residual)
    assert all(torch.equal(some[::2], many[::2]) for some, many in zip(got, everything, strict=True))


@pytest.mark.parametrize("rows", [1, 16, 40, 64])
def test_layers_in_a_graph(rows: int) -> None:
    """Each kernel begins while its predecessor runs, and counters are left as they were, at every replay."""
    layers = [Layer.random((1024, 1024, 2816, 1024), seed, has_bias=False) for seed in range(6)]
    x, residual = random((rows, 1024), DTYPE, 7), random((rows, 1024), DTYPE, 8)

    def run(by_steps: bool) -> tuple[Tensor, Tensor]:
        stream, hidden = residual, x
        for layer in layers:
            stream, hidden = layer.by_steps(hidden, stream) if by_steps else linear_chain(
                hidden, stream, layer.output, layer.mlp_norm, layer.gate_up, layer.down, layer.next_norm, EPSILONS,
                layer.qkv,
            )  # fmt: skip
        return stream, hidden

    expected = run(by_steps=True)
    first = run(by_steps=False)
    for got, wanted in zip(first, expected, strict=True):
        assert (got.double() - wanted.double()).norm() <= ERRORS[DTYPE] * wanted.double().norm()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(by_steps=False)
    for _ in range(30):
        for result in results:
            result.fill_(float("nan"))
        graph.replay()
        assert all(map(torch.equal, results, first))


@pytest.mark.parametrize(("rows", "dtype"), [(MOST_ROWS + 1, DTYPE), (5, torch.float16)])
def test_what_it_leaves_to_its_steps(rows: int, dtype: torch.dtype) -> None:
    layer = Layer.random((64, 144, 200, 96), 9, has_bias=True, dtype=dtype)
    assert not takes(rows, *layer.weights)
    x, residual = random((rows, 64), dtype, 10), random((rows, 144), dtype, 11)
    got = linear_chain(
        x, residual, layer.output, layer.mlp_norm, layer.gate_up, layer.down, layer.next_norm, EPSILONS,
        layer.qkv, layer.qkv_bias,
    )  # fmt: skip
    assert all(map(torch.equal, got, layer.by_steps(x, residual)))


def test_opcheck() -> None:
    layer = Layer.random((64, 144, 200, 96), 12, has_bias=True)
    x, residual = random((3, 64), DTYPE, 13), random((3, 144), DTYPE, 14)
    weights = layer.output, layer.mlp_norm, layer.gate_up, layer.down, layer.next_norm
    for last in ((None, None), (layer.qkv, None), (layer.qkv, layer.qkv_bias)):
        torch.library.opcheck(torch.ops.diptych.linear_chain.default, (x, residual, *weights, EPSILONS, *last))
