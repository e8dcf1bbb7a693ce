"""Launches of products with few rows, held to what the kernels' sources say, and which kernel gets which product."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from executor_service.kernels import small_linear
from tests.executor_service.compiled_kernels import constants
from tests.executor_service.host_kernels import needs_compiler
from tests.executor_service.launch_recorder import (
    A100,
    B200,
    CLUSTERS,
    GPUS,
    H100,
    H200,
    L40,
    Gpu,
    Launch,
    TensorMap,
    covers,
    meta,
    recorded,
    recorded_launch,
)

pytestmark = needs_compiler
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
STREAM, TILES, ANY = "small_linear", "small_linear_tiles", "small_linear_any"


def product(
    rows: int, features: int, width: int, dtype: torch.dtype = torch.bfloat16, *, gated: bool = False,
    added: bool = False, gpu: Gpu = H100, offset: int = 0,
) -> Launch:  # fmt: skip
    """The launch for x [rows, width], whose arguments are all in their places; x begins `offset` elements late."""
    x, weight = meta(rows, width, dtype=dtype, offset=offset), meta(features * (1 + gated), width, dtype=dtype)
    bias, residual = meta(features, dtype=dtype), meta(rows, features, dtype=dtype)
    addends = (bias, residual) if added else (None, None)
    arguments = (small_linear._silu_mul_cuda, x, weight) if gated else (small_linear._linear_cuda, x, weight, *addends)
    launch = recorded_launch(*arguments, gpu=gpu)
    assert launch["out"].shape == (rows, features)
    assert (launch["rows"], launch["features"]) == (rows, features)
    for name, given_tensor in (("bias", bias), ("residual", residual)):
        assert launch[name] is given_tensor if added and not gated else launch[name] == 0
    assert launch.kernel.template[-1] == gated
    if launch.kernel.source != TILES:
        assert launch["x"] is x
        assert launch["weight"] is weight
        assert launch["width"] == width
    return launch


def multiples(of: int, most: int) -> st.SearchStrategy[int]:
    return st.integers(1, most).map(lambda number: of * number)


sizes = {
    "rows": st.integers(1, 200), "features": st.one_of(st.integers(1, 99), multiples(8, 2000)),
    "width": st.one_of(st.integers(1, 300), multiples(8, 999), multiples(32, 99)),
    "dtype": st.sampled_from(DTYPES), "gated": st.booleans(), "added": st.booleans(), "gpu": st.sampled_from(GPUS),
    "offset": st.sampled_from([0, 0, 0, 4, 8]),
}  # fmt: skip


@given(**sizes)
def test_the_fastest_kernel_that_can_take_a_product_gets_it(
    rows: int, features: int, width: int, dtype: torch.dtype, gated: bool, added: bool, gpu: Gpu, offset: int
) -> None:
    """Tiles need Hopper and whole accesses; streams need bulk copies, and columns for four lanes in each access.

    Where a product can have both, slow memory leaves one row and two to the stream.
    """
    launch = product(rows, features, width, dtype, gated=gated, added=added, gpu=gpu, offset=offset)
    is_aligned = offset * dtype.itemsize % 16 == 0
    is_half = dtype.itemsize == 2 and is_aligned
    can_stream = gpu.capability >= (9, 0) and is_half and width % 32 == 0 and rows <= 16
    is_left = can_stream and rows <= (2 if gpu.memory_rate < 4e12 else 0)
    if gpu.capability == (9, 0) and is_half and features % 8 == width % 8 == 0 and rows <= 128 and not is_left:
        assert launch.kernel.source == TILES
        check_tiles(launch, width)
    elif can_stream:
        assert launch.kernel.source == STREAM
        check_stream(launch, gpu)
    else:
        assert launch.kernel.source == ANY
        check_any(launch, is_aligned and width * dtype.itemsize % 16 == 0)


@given(
    st.integers(1, 16), st.integers(1, 5000), multiples(32, 200), st.sampled_from(DTYPES[1:]), st.booleans(),
    st.booleans(), st.sampled_from([H100, B200]),
)  # fmt: skip
def test_streams(rows: int, features: int, width: int, dtype: torch.dtype, gated: bool, added: bool, gpu: Gpu) -> None:
    """Of all there are, on a GPU without tiles; where there are tiles, of two rows or features that these lack."""
    if gpu == H100 and features % 8 == 0:
        rows = 1 + rows % 2
    launch = product(rows, features, width, dtype, gated=gated, added=added, gpu=gpu)
    assert launch.kernel.source == STREAM
    check_stream(launch, gpu)


@given(
    st.integers(1, 128), multiples(8, 2500), multiples(8, 500), st.sampled_from(DTYPES[1:]), st.booleans(),
    st.booleans(),
)  # fmt: skip
@example(9, 128 * CLUSTERS, 64, torch.float16, False, True)
@example(9, 3 * 128 * CLUSTERS, 64, torch.float16, False, True)
@example(9, 64 * CLUSTERS, 64, torch.float16, True, False)
@example(9, 5 * 64 * CLUSTERS, 64, torch.float16, True, False)
def test_tiles(rows: int, features: int, width: int, dtype: torch.dtype, gated: bool, added: bool) -> None:
    """Also where nothing is left over beyond whole tiles: then there is still a map of it, for which 0 is no size."""
    launch = product(rows, features, width, dtype, gated=gated, added=added, gpu=H200)
    assert launch.kernel.source == TILES
    check_tiles(launch, width)


def check_stream(launch: Launch, gpu: Gpu) -> None:
    """A block for each multiprocessor, and as many stages as its shared memory holds beside the warps' sums."""
    known = constants(STREAM)
    _, piece, groups, _, _ = launch.kernel.template
    assert launch.grid == (gpu.multiprocessors, 1, 1)
    assert launch.block == known["kThreads"]
    assert covers(groups, 8, launch["rows"])
    stage_bytes = known["kTileRows"] * (2 * piece + known["kPadBytes"]) + 2 * 8
    sums_bytes = 2 * known["kConsumers"] * known["kSumsWords"] * 4
    assert launch["num_stages"] == (launch.shared_bytes - sums_bytes) // stage_bytes
    # A block that has a multiprocessor to itself, with the KiB that a GPU has of each.
    assert 2 * launch.shared_bytes > gpu.shared_of_multiprocessor - 1024


def check_any(launch: Launch, is_wide: bool) -> None:
    """A warp for each feature and eight rows."""
    known = constants(ANY)
    access = launch.kernel.template[1]
    assert (access > 1) == is_wide
    assert launch.block == 32 * known["kWarps"]
    assert covers(launch.grid[0], known["kWarps"], launch["features"])
    assert covers(launch.grid[1], known["kRows"], launch["rows"])
    assert launch.grid[2] == 1


def check_tiles(launch: Launch, width: int) -> None:
    """Clusters that all run at once share the features, each a multiple of eight; its blocks share the columns."""
    known = constants(TILES)
    _, compiled_rows, groups, gated = launch.kernel.template
    assert compiled_rows == next(most for most in (16, 32, 64, 96, 128) if most >= launch["rows"])
    assert launch.cluster == known["kSplits"]
    assert launch.block == launch.kernel.max_threads == 32 * (4 * groups + 2)
    clusters = launch.grid[0] // launch.cluster
    assert clusters <= CLUSTERS
    assert launch["range"] % 8 == 0
    assert covers(clusters, launch["range"], launch["features"])
    assert covers(launch["steps"], launch.cluster * known["kColumns"], width)
    used = shared_of_tiles(launch)
    assert used <= launch.shared_bytes
    assert launch["num_stages"] == 12 or launch.shared_bytes < used + launch["stage_bytes"] + 16
    assert 3 <= launch["num_ahead"] <= launch["num_stages"]
    # More warpgroups only where there would be more tiles than one, or where the kernel is compiled for no fewer.
    assert groups == (2 if compiled_rows <= 64 or (not gated and launch["range"] <= 128) else 3)
    check_boxes(launch, width)


def shared_of_tiles(launch: Launch) -> int:
    """Stages of x and of weights, other blocks' sums, scratch, barriers; and what aligning takes."""
    known = constants(TILES)
    _, compiled_rows, groups, _ = launch.kernel.template
    num_stages, num_x_stages, warps = launch["num_stages"], launch["num_x_stages"], 4 * groups
    x_bytes = -(-launch["rows"] // 8) * 8 * known["kRowBytes"]
    together = min(2, compiled_rows // 8 // known["kSplits"])
    sums = (known["kSplits"] - 1) * together * 512
    rings = num_x_stages * x_bytes + num_stages * launch["stage_bytes"]
    return 1023 + rings + warps * (sums + known["kScratchBytes"]) + 16 * (num_stages + num_x_stages + warps)


def check_boxes(launch: Launch, width: int) -> None:
    """A copy brings as many bytes as its barrier waits for, of tiles, of what a range has beyond them, and of x."""
    known = constants(TILES)
    _, _, groups, gated = launch.kernel.template
    units = 64 * groups // (2 if gated else 1)
    rest = launch["range"] % units
    weight, rest_map, x = (launch[name] for name in ("weight_map", "rest_map", "x_map"))
    assert launch["stage_bytes"] == min(launch["range"], units) * (2 if gated else 1) * known["kRowBytes"]
    if launch["range"] >= units:
        assert math.prod(weight.box) * 2 == launch["stage_bytes"]
    if rest:
        assert math.prod(rest_map.box) == rest * (2 if gated else 1) * known["kColumns"]
    assert x.box == (known["kColumns"], -(-launch["rows"] // 8) * 8)
    assert (x.sizes, x.strides) == ((width, launch["rows"]), (2 * width,))
    assert all(1 <= size <= 256 for found in (weight, rest_map, x) for size in found.box)


@pytest.mark.parametrize(("rows", "gpu", "source"), [
    (1, H100, STREAM), (2, H100, STREAM), (3, H100, TILES), (128, H100, TILES), (129, H100, ANY),
    (1, H200, TILES), (128, H200, TILES), (16, B200, STREAM), (17, B200, ANY), (1, A100, ANY), (1, L40, ANY),
])  # fmt: skip
def test_rows_decide(rows: int, gpu: Gpu, source: str) -> None:
    assert product(rows, 4096, 4096, gpu=gpu).kernel.source == source


@pytest.mark.parametrize(("features", "width", "source"), [
    (4096, 4096, TILES), (4100, 4096, STREAM), (4100, 4104, ANY), (4096, 4104, TILES), (4096, 4100, ANY), (64, 0, ANY),
])  # fmt: skip
def test_sizes_decide(features: int, width: int, source: str) -> None:
    assert product(9, features, width).kernel.source == source


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_the_fewest_rows_are_tiles_where_they_cannot_stream(rows: int) -> None:
    """Not the plain kernel's: `takes` has said that the product is faster here than in cuBLAS."""
    assert product(rows, 4096, 4104).kernel.source == TILES


@pytest.mark.parametrize("late", ["x", "weight", "residual"])
@pytest.mark.parametrize("rows", [1, 9])
def test_what_is_read_in_packs_has_to_be_aligned(late: str, rows: int) -> None:
    x, weight, residual = (
        meta(*shape, offset=4 * (name == late))
        for name, shape in (("x", (rows, 64)), ("weight", (32, 64)), ("residual", (rows, 32)))
    )
    launch = recorded_launch(small_linear._linear_cuda, x, weight, meta(32, offset=1), residual)
    assert launch.kernel.name == f"{ANY}_bfloat16_plain_single"


@pytest.mark.parametrize(("gpu", "source"), [(H100, TILES), (B200, STREAM)])
def test_sixteen_bytes_are_aligned_enough(gpu: Gpu, source: str) -> None:
    x, weight, residual = meta(9, 64, offset=8), meta(32, 64, offset=8), meta(9, 32, offset=8)
    assert recorded_launch(small_linear._linear_cuda, x, weight, None, residual, gpu=gpu).kernel.source == source


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("features", [8, 1000, 16384])
def test_boxes_are_where_the_weights_rows_are(gated: bool, features: int) -> None:
    """By turns eight rows of the gate and the eight of the other half that they go with."""
    weight = torch.empty(features * (1 + gated), 72, dtype=torch.bfloat16)
    x = torch.empty(20, 72, dtype=torch.bfloat16)
    function = small_linear._silu_mul_cuda if gated else small_linear._linear_cuda
    launch = recorded_launch(function, x, weight, *([] if gated else [None, None]))
    assert launch["x_map"].address == x.data_ptr()
    for found in (launch["weight_map"], launch["rest_map"]):
        check_map(found, weight, features if gated else 0)
    check_boxes(launch, 72)


def check_map(found: TensorMap, weight: Tensor, apart: int) -> None:
    """`apart` rows are from a gate to what it gates; 0: there are no gates."""
    assert (found.address, found.dtype) == (weight.data_ptr(), torch.bfloat16)
    assert math.prod(found.sizes) == weight.numel()
    for column, *numbers in itertools.product(*((0, size - 1) for size in found.sizes)):
        row = numbers[0] + apart * numbers[1] + 8 * numbers[2] if apart else numbers[0]
        strides = zip(numbers, found.strides, strict=True)
        assert found.address + 2 * column + sum(n * stride for n, stride in strides) == weight[row, column].data_ptr()
    assert found.box[:-1] == ((64, 8, 2) if apart else (64,))


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(
    ("features", "width"), [(1024, 4096), (1028, 4096), (1032, 4104), (1024, 4100), (1024, 504), (1024, 512)]
)
def test_a_product_is_taken_where_a_fast_kernel_has_it(gpu: Gpu, features: int, width: int) -> None:
    """Of a weight with a million elements and up to as many rows as are faster here; gated or not."""
    for dtype, rows, offset in itertools.product(DTYPES, (1, 3, 16, 17, 96, 97, 128, 129), (0, 4, 8)):
        weight = meta(2 * features, width, dtype=dtype, offset=offset).as_subclass(OnGpu)
        with recorded(gpu):
            is_taken = small_linear.takes(rows, weight)
        with recorded(gpu) as launches:
            small_linear._silu_mul_cuda(meta(rows, width, dtype=dtype), weight)
        is_fast = launches[0].kernel.source != ANY
        assert is_taken == (is_fast and 2 * features * width >= 1 << 20 and rows <= 128)


def test_what_is_not_taken_at_all() -> None:
    weight = meta(4096, 1024).as_subclass(OnGpu)
    with recorded():
        assert small_linear.takes(5, weight)
        assert not small_linear.takes(5, meta(4096, 1024))
        assert not small_linear.takes(5, weight.T)
        assert not small_linear.takes(5, weight[:, ::2])
        assert not small_linear.takes(20, meta(4097, 1024).as_subclass(OnGpu))


def test_nothing_is_launched_for_nothing_and_nothing_that_does_not_match() -> None:
    with recorded() as launches:
        small_linear._linear_cuda(meta(0, 64), meta(32, 64), None, None)
        small_linear._linear_cuda(meta(3, 64), meta(0, 64), None, None)
        small_linear._silu_mul_cuda(meta(0, 64), meta(32, 64))
        with pytest.raises(ValueError, match="x has 64 columns, the weight 72"):
            small_linear._linear_cuda(meta(3, 64), meta(32, 72), None, None)
        with pytest.raises(ValueError, match="x has 64 columns, the weight 72"):
            small_linear._silu_mul_cuda(meta(3, 64), meta(32, 72))
    assert not launches


def test_what_is_not_dense_is_made_so() -> None:
    x, weight, bias, residual = meta(64, 3).T, meta(64, 36).T, meta(36, 2)[:, 0], meta(36, 3).T
    with recorded(A100) as launches:
        small_linear._linear_cuda(x, weight, bias, residual)
        small_linear._silu_mul_cuda(x, weight)
    for launch in launches:
        tensors = [value for value in launch.arguments.values() if isinstance(value, torch.Tensor)]
        assert len(tensors) in {3, 5}
        assert all(tensor.is_contiguous() for tensor in tensors)
