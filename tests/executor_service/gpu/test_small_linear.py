"""small_linear on a GPU: all variants against float64 on the same inputs, and rows that do not see each other.

Everything runs twice: with the variant for a few rows taking all that it can, and leaving all to tiles where there are.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from executor_service.kernels import small_linear as module
from executor_service.kernels.silu_mul import silu_mul
from executor_service.kernels.small_linear import MAX_ROWS, small_linear, small_linear_silu_mul, takes
from executor_service.kernels.small_linear_tiles import MOST_ROWS
from tests.executor_service.gpu.tensors import DTYPES, ERRORS, SEEDS, close, poison, random

pytestmark = pytest.mark.gpu

FEW = 16
ROWS = st.one_of(st.integers(0, FEW), st.integers(FEW + 1, MOST_ROWS + 3))
FEATURES = st.sampled_from([1, 6, 16, 100, 132, 1000, 4096, 6400])
WIDTHS = st.sampled_from([1, 7, 16, 64, 128, 384, 1000, 2048, 4096 + 128])
HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(scope="module", params=[FEW, 0], ids=["few", "tiles"], autouse=True)
def fewest(request: pytest.FixtureRequest) -> Iterator[int]:
    """Rows that go to the variant for a few where tiles could have them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "fewest_rows", lambda device: request.param)
        yield FEW if torch.cuda.get_device_capability() != (9, 0) else request.param


def inputs(rows: int, features: int, width: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """x and a weight that leaves the product about as large as x."""
    x, weight = random((rows, width), dtype, seed), random((features, width), torch.float32, seed + 1)
    weight = (weight / width**0.5).to(dtype)
    torch.cuda.synchronize()  # a weight is not written by the kernel just before
    return x, weight


@settings(max_examples=80)
@given(ROWS, FEATURES, WIDTHS, DTYPES, st.booleans(), st.booleans(), SEEDS)
def test_small_linear(
    rows: int, features: int, width: int, dtype: torch.dtype, has_bias: bool, has_residual: bool, seed: int
) -> None:
    x, weight = inputs(rows, features, width, dtype, seed)
    bias = random((features,), dtype, seed + 2) if has_bias else None
    residual = random((rows, features), dtype, seed + 3) if has_residual else None
    expected = x.double() @ weight.double().T
    for term in (bias, residual):
        if term is not None:
            expected = expected + term.double()
    poison()
    close(small_linear(x, weight, bias, residual), expected)


@settings(max_examples=50)
@given(ROWS, FEATURES, WIDTHS, DTYPES, SEEDS)
def test_small_linear_silu_mul(rows: int, features: int, width: int, dtype: torch.dtype, seed: int) -> None:
    """As the two ops one after the other: the products, the activation and the result are rounded alike."""
    x, gate_up = inputs(rows, 2 * features, width, dtype, seed)
    poison()
    got = small_linear_silu_mul(x, gate_up)
    close(got, silu_mul(small_linear(x, gate_up)).double())
    gate, up = (x.double() @ gate_up.double().T).chunk(2, dim=-1)
    close(got, gate / (1 + (-gate).exp()) * up)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(12288, 4096), (4096, 4096), (4096, 11008), (32064, 4096), (4096, 14336)])
def test_large(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """A decoder's own sizes: several passes, a last piece of columns that is not whole."""
    weight = (torch.randn(shape, device="cuda") / shape[1] ** 0.5).to(dtype)
    everything = torch.randn((MOST_ROWS, shape[1]), device="cuda").to(dtype)
    residual = torch.randn((MOST_ROWS, shape[0]), device="cuda").to(dtype)
    expected = (everything.float() @ weight.float().T).double()
    torch.cuda.synchronize()
    for rows in (1, 2, 7, 8, 9, 16, 17, 24, 32, 33, 64, 65, 96, 97, MOST_ROWS):
        assert takes(rows, weight) == (rows <= MAX_ROWS)
        poison()
        close(small_linear(everything[:rows], weight, None, residual[:rows]), expected[:rows] + residual[:rows])


@pytest.mark.parametrize("shape", [(11008, 4096), (14336, 4096), (2816, 1024)])
def test_large_gated(shape: tuple[int, int]) -> None:
    """A decoder's own sizes of gate and up."""
    inner, width = shape
    x, gate_up = inputs(MOST_ROWS, 2 * inner, width, torch.bfloat16, 4)
    gate, up = (x.float() @ gate_up.float().T).double().chunk(2, dim=-1)
    expected = gate / (1 + (-gate).exp()) * up
    for rows in (1, 16, 17, 33, 64, 65, 96, 97, MOST_ROWS):
        poison()
        close(small_linear_silu_mul(x[:rows], gate_up), expected[:rows])


@pytest.mark.parametrize("dtype", HALVES)
def test_rows_do_not_see_each_other(dtype: torch.dtype) -> None:
    """Alone, among others, beside rows of NaN: the same bits, at every number of rows that one variant takes."""
    x, weight = inputs(FEW, 1000, 4096 + 128, dtype, 5)
    alone = torch.cat([small_linear(x[row : row + 1], weight) for row in range(FEW)])
    for rows in range(1, FEW + 1):
        assert torch.equal(small_linear(x[:rows], weight), alone[:rows])
    x[1::2] = float("nan")
    assert torch.equal(small_linear(x, weight)[::2], alone[::2])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("features", [1000, 4096])
def test_more_rows_do_not_see_each_other(fewest: int, features: int, dtype: torch.dtype) -> None:
    """As above, among those of the other variant; and the same bits at every run."""
    x, weight = inputs(MOST_ROWS, features, 4096 + 72, dtype, 6)
    everything = small_linear(x, weight)
    for rows in (*range(fewest + 1, MOST_ROWS, 5), MOST_ROWS):
        poison()
        assert torch.equal(small_linear(x[:rows], weight), everything[:rows])
        assert torch.equal(small_linear(x[-rows:], weight), everything[-rows:])
    x[1::2] = float("nan")
    assert torch.equal(small_linear(x, weight)[::2], everything[::2])


def test_a_row_of_the_weight_does_not_spoil_others() -> None:
    x, weight = inputs(5, 1000, 512, torch.bfloat16, 9)
    clean = small_linear(x, weight)
    weight[500] = float("inf")
    torch.cuda.synchronize()
    got = small_linear(x, weight)
    kept = torch.arange(1000, device="cuda") != 500
    assert torch.equal(got[:, kept], clean[:, kept])
    assert not got[:, 500].isfinite().any()


@pytest.mark.parametrize("features", [1 << 18, 66 * (20 * 192 + 64), 66 * (30 * 128 + 64)])
@pytest.mark.parametrize("rows", [5, 8, 16, 17, 33, 40, 65, 72, 97])
def test_blocks_of_a_cluster_drift_apart(rows: int, features: int) -> None:
    """Dozens of tiles each, of few columns: nobody waits for ever, where some have no rows to add up, too.

    Among 66 clusters only a warpgroup has a part of the last tile of some of them.
    """
    x, weight = inputs(rows, features, 128, torch.bfloat16, 3)
    expected = (x.float() @ weight.float().T).double()
    for _ in range(20):
        got = small_linear(x, weight)
    close(got, expected)


@pytest.mark.parametrize("rows", [4, 40, 100])
def test_chain_in_a_graph(rows: int) -> None:
    """Each kernel begins while its predecessor runs, and still sees all that it wrote, at every replay."""
    x, first = inputs(rows, 8192, 2048, torch.bfloat16, 1)
    _, second = inputs(1, 2048, 8192, torch.bfloat16, 2)

    def chain(start: Tensor) -> Tensor:
        for _ in range(6):
            start = small_linear(small_linear(start, first), second, None, start)
        return start

    expected = x
    for _ in range(6):
        middle = (expected.double() @ first.double().T).bfloat16()
        expected = (middle.double() @ second.double().T + expected.double()).bfloat16()
    chain(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = chain(x)
    graph.replay()
    got = result.clone()
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert error < 2 * ERRORS[torch.bfloat16]
    for _ in range(30):
        result.fill_(float("nan"))
        graph.replay()
        assert torch.equal(result, got)


@pytest.mark.parametrize("dtype", list(ERRORS))
def test_opcheck(dtype: torch.dtype) -> None:
    x, weight = inputs(3, 32, 128, dtype, 0)
    ops = torch.ops.diptych
    torch.library.opcheck(ops.small_linear.default, (x, weight, random((32,), dtype, 1), random((3, 32), dtype, 2)))
    torch.library.opcheck(ops.small_linear.default, (x, weight, None, None))
    torch.library.opcheck(ops.small_linear_silu_mul.default, (x, weight))


def test_float64_is_refused() -> None:
    x = torch.zeros((2, 16), dtype=torch.float64, device="cuda")
    with pytest.raises(TypeError, match="float64"):
        small_linear(x, x)
