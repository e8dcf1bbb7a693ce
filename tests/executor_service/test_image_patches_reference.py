"""Image patches on the CPU: the rows with which a convolution becomes a matrix product."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from hypothesis import given, settings
from hypothesis import strategies as st

from executor_service.kernels import image_patches as module
from executor_service.kernels.image_patches import MAX_DIVIDED, Divisor, image_patches
from executor_service.kernels.normalize import normalize
from tests.executor_service.host_kernels import needs_compiler
from tests.executor_service.launch_recorder import meta, recorded


@settings(max_examples=30)
@given(
    st.integers(0, 3), st.sampled_from([1, 3]), st.integers(1, 4), st.integers(4, 13), st.integers(4, 13),
    st.integers(0, 5), st.integers(0, 2**16),
)  # fmt: skip
def test_a_product_with_them_is_the_convolution(
    num_tiles: int, num_channels: int, patch: int, height: int, width: int, padding: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tiles = torch.randint(256, (num_tiles, num_channels, height, width), generator=generator, dtype=torch.uint8)
    table = torch.randn(num_channels, 256, generator=generator)
    weight = torch.randn(5, num_channels, patch, patch, generator=generator, dtype=torch.float64)
    columns = num_channels * patch * patch
    rows = image_patches(tiles, table, patch, columns + padding, torch.float64)
    assert (rows[:, columns:] == 0).all()
    product = rows[:, :columns] @ weight.flatten(1).T
    expected = F.conv2d(normalize(tiles, table, 1, torch.float64), weight, stride=patch)
    torch.testing.assert_close(product, expected.permute(0, 2, 3, 1).reshape(-1, 5), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    tiles, table = torch.randint(256, (2, 3, 9, 8), dtype=torch.uint8), torch.randn(3, 256)
    torch.library.opcheck(torch.ops.diptych.image_patches.default, (tiles, table, 4, 50, dtype))


@pytest.mark.parametrize("value", [2, 3, 7, 14, 21, 80, 294, 641, 4095, 4096, 65521, MAX_DIVIDED - 1])
def test_the_kernel_divides_exactly(value: int) -> None:
    """By the upper half of a product of 32 bits each, as on a GPU."""
    divisor = Divisor(value)
    for number in range(MAX_DIVIDED):
        assert number * divisor.reciprocal >> 32 == number // value


@given(st.integers(2, MAX_DIVIDED - 1), st.integers(0, MAX_DIVIDED - 1))
def test_any_two_numbers_are_divided_exactly(value: int, number: int) -> None:
    assert number * Divisor(value).reciprocal >> 32 == number // value


@needs_compiler
@given(
    st.sampled_from([torch.float32, torch.bfloat16]), st.integers(1, 4), st.integers(1, 40), st.integers(1, 800),
    st.sampled_from([2, 3, 7, 8, 14, 16, 28]), st.integers(0, 40),
)  # fmt: skip
def test_the_wide_kernel_gets_what_it_can_take(
    dtype: torch.dtype, num_channels: int, rows: int, width: int, patch: int, padding: int
) -> None:
    """Whole packs everywhere, an odd number of them from row to row, room for all, and nothing divided by 1."""
    columns, count = num_channels * patch**2 + padding, 16 // dtype.itemsize
    tiles = meta(1, num_channels, rows * patch, width, dtype=torch.uint8)
    with recorded() as launches:
        module._cuda(tiles, meta(num_channels, 256, dtype=torch.float32), patch, columns, dtype)
    if width < patch:
        assert not launches
        return
    (launch,) = launches
    if "shape" not in launch.arguments:
        assert width % 16 or width < 32 or patch % 2 or columns % count or columns < 2 * count or columns > 512 * count
        return
    shape = launch["shape"]
    assert (width % 16, patch % 2, columns % count) == (0, 0, 0)
    assert [getattr(shape, name) for name in ("num_channels", "height", "width", "columns")] == [
        num_channels, rows * patch, width, columns,
    ]  # fmt: skip
    assert shape.pitch >= width
    assert shape.pitch % 32 == 16
    assert launch.shared_bytes == num_channels * (256 * dtype.itemsize + patch * shape.pitch) <= 96 * 1024
    assert launch.block % (columns // count) == 0
    assert launch.grid == (rows, 1, 1)
    values = [getattr(shape, name).value for name in ("patch", "packs", "row_packs", "channel_packs")]
    assert values == [patch, columns // count, width // 16, width // 16 * patch]
    assert min(values) > 1
