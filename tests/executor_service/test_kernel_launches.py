"""Launches of kernels that take elements or rows one by one, held to what the kernels' sources say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from executor_service.kernels import image_patches, layer_norm, normalize, quick_gelu, rms_norm, silu_mul
from tests.executor_service.compiled_kernels import compiled, constants
from tests.executor_service.host_kernels import needs_compiler
from tests.executor_service.launch_recorder import (
    A100,
    GPUS,
    H100,
    Gpu,
    Launch,
    covers,
    meta,
    recorded,
    recorded_launch,
)

pytestmark = needs_compiler
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = st.sampled_from(DTYPES)
gpus = st.sampled_from(GPUS)
widths = st.one_of(st.integers(1, 70), st.integers(1, 20_000), st.integers(1, 2500).map(lambda n: 8 * n))
counts = st.one_of(widths, st.integers(1, 1 << 36))


def accesses(launch: Launch, width: int, dtype: torch.dtype) -> int:
    """How many a row takes, as the kernel makes them: 16 bytes each if rows are whole ones, else an element."""
    _, count, *_ = launch.kernel.template
    assert count == (1 if width * dtype.itemsize % 16 else 16 // dtype.itemsize)
    return width // count


def check_block(launch: Launch, packs: int, each: int) -> None:
    """Whole warps, and `each` packs of a thread hold all `packs`; one warp less would not."""
    assert launch.block % 32 == 0
    assert covers(launch.block // 32, 32 * each, packs)


@given(dtypes, counts, st.integers(0, 9))
def test_quick_gelu(dtype: torch.dtype, count: int, offset: int) -> None:
    x = meta(count, dtype=dtype, offset=offset)
    launch = recorded_launch(quick_gelu._cuda, x)
    launch.check_arguments(x=x, out=launch["out"], count=count)
    assert launch["out"].shape == x.shape
    _, access = launch.kernel.template
    is_whole = count * dtype.itemsize % 16 == 0 and offset * dtype.itemsize % 16 == 0
    assert access == (16 // dtype.itemsize if is_whole else 1)
    assert launch.block % 32 == 0
    assert covers(launch.grid[0], launch.block * constants("quick_gelu")["kPacks"] * access, count)
    assert launch.grid[1:] == (1, 1)


@given(dtypes, st.integers(1, 1 << 20), widths, gpus)
def test_silu_mul(dtype: torch.dtype, rows: int, width: int, gpu: Gpu) -> None:
    gate_up = meta(rows, 2 * width, dtype=dtype)
    launch = recorded_launch(silu_mul._cuda, gate_up, gpu=gpu)
    launch.check_arguments(gate_up=gate_up, out=launch["out"], width=width)
    assert launch["out"].shape == (rows, width)
    packs, each = accesses(launch, width, dtype), launch.kernel.template[2]
    assert launch.grid[0] == rows
    assert launch.block % 32 == 0
    assert covers(launch.grid[1], launch.block * each, packs)
    # Whole warps are left over only where pieces of a row are as even as warps let them be.
    assert (launch.block - 32) * each * launch.grid[1] < packs


@pytest.mark.parametrize("gpu", GPUS)
def test_silu_mul_cuts_few_rows_into_more_pieces(gpu: Gpu) -> None:
    """Two rows for each multiprocessor are many: then threads have more loads under way."""
    few, many = (
        recorded_launch(silu_mul._cuda, meta(rows, 2 * 11008), gpu=gpu)
        for rows in (2 * gpu.multiprocessors - 1, 2 * gpu.multiprocessors)
    )
    assert few.grid[1] >= 4 * many.grid[1]
    assert few.kernel.template[2] == 1 < many.kernel.template[2]
    assert few.block < many.block


def test_silu_mul_takes_rows_of_any_shape() -> None:
    launch = recorded_launch(silu_mul._cuda, meta(2, 3, 5, 16))
    assert (launch.grid[0], launch["width"]) == (30, 8)


def check_norm(launch: Launch, rows: int, width: int, dtype: torch.dtype) -> None:
    """A block for each row, whose threads hold it, and with as few accesses each as there is a kernel for."""
    assert launch.grid == (rows, 1, 1)
    packs, (_, count, each, adds) = accesses(launch, width, dtype), launch.kernel.template
    check_block(launch, packs, each)
    fitting = [
        other.template[2]
        for other in compiled(launch.kernel.source).values()
        if other.template[0] == launch.kernel.template[0] and other.template[1::2] == (count, adds)
        if other.template[2] * other.max_threads >= packs
    ]
    assert each == min(fitting)


@given(dtypes, st.integers(1, 1 << 24), widths)
@example(torch.bfloat16, 3, 16383)
@example(torch.bfloat16, 3, 16385)
@example(torch.float32, 3, 16384)
@example(torch.float32, 3, 16388)
def test_rms_norm(dtype: torch.dtype, rows: int, width: int) -> None:
    x, residual, weight = meta(rows, width, dtype=dtype), meta(rows, width, dtype=dtype), meta(width, dtype=dtype)
    packs, most = (width, 16 * 1024) if width * dtype.itemsize % 16 else (width * dtype.itemsize // 16, 8 * 512)
    if packs > most:
        with pytest.raises(ValueError, match=f"at most {most} accesses, not of {packs}"), recorded():
            rms_norm._rms_norm_cuda(x, weight, 1e-5)
        return
    plain = recorded_launch(rms_norm._rms_norm_cuda, x, weight, 1e-5)
    plain.check_arguments(x=x, weight=weight, out=plain["out"], width=width, epsilon=1e-5)
    adding = recorded_launch(rms_norm._add_rms_norm_cuda, x, residual, weight, 1e-5)
    adding.check_arguments(x=x, residual=residual, weight=weight, out=adding["out"], width=width, epsilon=1e-5)
    for launch, adds in ((plain, False), (adding, True)):
        assert launch["out"].shape == (rows, width)
        assert launch.kernel.template[3] == adds
        check_norm(launch, rows, width, dtype)


@given(dtypes, st.integers(1, 1 << 22), st.integers(1, 4), widths)
@example(torch.bfloat16, 3, 2, 8191)
@example(torch.bfloat16, 3, 2, 8193)
@example(torch.float32, 3, 2, 8192)
@example(torch.float32, 3, 2, 8196)
def test_layer_norm(dtype: torch.dtype, rows: int, others: int, width: int) -> None:
    x, residual = (meta(others, rows, width, dtype=dtype) for _ in range(2))
    weight, bias = (meta(width, dtype=dtype) for _ in range(2))
    packs, most = (width, 16 * 512) if width * dtype.itemsize % 16 else (width * dtype.itemsize // 16, 4 * 512)
    if packs > most:
        with pytest.raises(ValueError, match=f"at most {most} accesses, not of {packs}"), recorded():
            layer_norm._layer_norm_cuda(x, weight, bias, 1e-5)
        return
    plain = recorded_launch(layer_norm._layer_norm_cuda, x, weight, bias, 1e-5)
    plain.check_arguments(x=x, weight=weight, bias=bias, out=plain["out"], width=width, epsilon=1e-5)
    with recorded() as launches:
        total, out = layer_norm._add_layer_norm_cuda(x, residual, weight, bias, 1e-5)
    (adding,) = launches
    adding.check_arguments(
        x=x, residual=residual, weight=weight, bias=bias, total=total, out=out, width=width, epsilon=1e-5
    )
    for launch, adds in ((plain, False), (adding, True)):
        assert launch["out"].shape == x.shape
        assert launch.kernel.template[3] == adds
        check_norm(launch, others * rows, width, dtype)


@given(
    dtypes, st.lists(st.integers(1, 70), min_size=1, max_size=4), st.integers(0, 3), st.integers(0, 1), st.booleans(),
    st.integers(0, 17), gpus,
)  # fmt: skip
@example(torch.bfloat16, [3, 999, 1001], 0, 0, False, 0, H100)
@example(torch.bfloat16, [3, 999, 999], 0, 0, False, 0, A100)
def test_normalize(
    dtype: torch.dtype, shape: list[int], axis: int, scale: int, from_the_end: bool, offset: int, gpu: Gpu
) -> None:
    """Planes of one channel lie together; `inner` are the elements of a plane."""
    axis %= len(shape)
    shape[-1] *= 16 * 1024 * scale or 1
    tensor, table = meta(*shape, dtype=torch.uint8, offset=offset), meta(shape[axis], 256, dtype=torch.float32)
    inner, count = torch.Size(shape[axis + 1 :]).numel(), tensor.numel()
    arguments = tensor, table, axis - len(shape) * from_the_end, dtype
    launch = recorded_launch(normalize._cuda, *arguments, gpu=gpu)
    assert launch["out"].shape == tensor.shape
    assert launch["num_channels"] == shape[axis]
    assert launch["levels"] is tensor
    assert launch["table"] is table
    assert launch.block % 32 == 0
    access = 16 // dtype.itemsize
    is_wide = inner % access == 0 and offset % access == 0
    assert launch.kernel.name.endswith("_wide" if is_wide else "_single")
    if is_wide:
        pieces, in_flight = launch["pieces"], constants("normalize")["kInFlight"]
        assert launch["packs"] * access == inner
        assert launch.grid == (count // inner * pieces, 1, 1)
        assert covers(pieces, in_flight * launch.block, launch["packs"])
    else:
        assert (launch["count"], launch["inner"]) == (count, inner)
        check_strided(launch, count, gpu)


def check_strided(launch: Launch, count: int, gpu: Gpu) -> None:
    """Threads that take element after element: no more blocks than there is work, nor than keep the GPU busy."""
    (blocks, *others), most = launch.grid, 16 * gpu.multiprocessors
    assert others == [1, 1]
    assert blocks == most if count > most * launch.block else covers(blocks, launch.block, count)


@given(dtypes, st.integers(0, 16), st.integers(1, 3), st.integers(1, 60), st.integers(1, 8), st.integers(2, 15), gpus)
def test_image_patches(
    dtype: torch.dtype, offset: int, num_tiles: int, height: int, width: int, patch: int, gpu: Gpu
) -> None:
    """A block for each row of patches where the wide kernel takes them, else element by element."""
    height, width = height + patch, 16 * width + (0 if offset < 12 else offset)
    tiles, table = meta(num_tiles, 3, height, width, dtype=torch.uint8, offset=offset), meta(3, 256, dtype=torch.float)
    columns = -(-3 * patch * patch // 8) * 8
    if not width // patch:
        return
    launch = recorded_launch(image_patches._cuda, tiles, table, patch, columns, dtype, gpu=gpu)
    rows = num_tiles * (height // patch)
    assert launch["out"].shape == (rows * (width // patch), columns)
    assert launch["tiles"] is tiles
    assert launch["table"] is table
    if "shape" in launch.arguments:
        assert offset % 16 == 0
        assert launch.grid == (rows, 1, 1)
        return
    assert offset % 16 or width % 16 or width == 16 or patch % 2
    named = {name: launch[name] for name in ("num_channels", "height", "width", "patch", "columns", "count")}
    assert list(named.values()) == [3, height, width, patch, columns, launch["out"].numel()]
    assert launch.block % 32 == 0
    check_strided(launch, launch["out"].numel(), gpu)


def test_image_patches_of_many_tiles_are_counted_with_64_bits() -> None:
    tiles, table = meta(30_000, 3, 337, 337, dtype=torch.uint8), meta(3, 256, dtype=torch.float32)
    launch = recorded_launch(image_patches._cuda, tiles, table, 14, 592, torch.bfloat16)
    assert launch["count"] == 30_000 * 24 * 24 * 592 > 1 << 32
    assert launch.grid[0] == 16 * H100.multiprocessors


def test_blocks_are_as_large_as_was_fastest() -> None:
    """As measured (docs/notes/streaming.md); nothing else depends on it."""
    levels, table = meta(8, 3, 336, 336, dtype=torch.uint8), meta(3, 256, dtype=torch.float32)
    with recorded() as launches:
        quick_gelu._cuda(meta(576, 4096))
        silu_mul._cuda(meta(4096, 2 * 16384))
        silu_mul._cuda(meta(8, 2 * 16384))
        normalize._cuda(levels, table, 1, torch.bfloat16)
        image_patches._cuda(levels, table, 14, 592, torch.bfloat16)
        image_patches._cuda(levels, table, 14, 588, torch.bfloat16)
    assert [launch.block for launch in launches] == [256, 512, 128, 256, 480 // 74 * 74, 256]


def test_what_is_not_dense_is_made_so() -> None:
    """Kernels that write take an operand as it is; all others may be any view."""
    rows = torch.empty(64, 48, dtype=torch.bfloat16, device="meta").T
    levels = torch.empty(64, 48, dtype=torch.uint8, device="meta").T
    table, weight = meta(48, 256, dtype=torch.float32), meta(64)
    with recorded() as launches:
        quick_gelu._cuda(rows)
        silu_mul._cuda(rows)
        rms_norm._rms_norm_cuda(rows, weight, 1e-5)
        rms_norm._add_rms_norm_cuda(rows, rows.contiguous(), weight, 1e-5)
        layer_norm._layer_norm_cuda(rows, weight, weight, 1e-5)
        layer_norm._add_layer_norm_cuda(rows, rows, weight, weight, 1e-5)
        normalize._cuda(levels, table, 0, torch.bfloat16)
        image_patches._cuda(levels.view(1, 1, 48, 64), table[:1], 4, 16, torch.bfloat16)
    for launch in launches:
        tensors = [value for value in launch.arguments.values() if isinstance(value, torch.Tensor)]
        assert all(tensor.is_contiguous() for tensor in tensors), launch.kernel.name
    assert len(launches) == 8


def test_nothing_is_launched_for_nothing() -> None:
    empty, weight = meta(0, 64), meta(64)
    with recorded() as launches:
        quick_gelu._cuda(empty)
        silu_mul._cuda(empty)
        rms_norm._rms_norm_cuda(empty, weight, 1e-5)
        rms_norm._add_rms_norm_cuda(empty, empty, weight, 1e-5)
        layer_norm._layer_norm_cuda(empty, weight, weight, 1e-5)
        layer_norm._add_layer_norm_cuda(empty, empty, weight, weight, 1e-5)
        normalize._cuda(meta(3, 0, dtype=torch.uint8), meta(3, 256, dtype=torch.float32), 0, torch.bfloat16)
        image_patches._cuda(
            meta(0, 3, 28, 28, dtype=torch.uint8), meta(3, 256, dtype=torch.float), 14, 588, torch.float
        )
    assert not launches
