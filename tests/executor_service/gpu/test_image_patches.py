"""The CUDA kernel of image patches against the reference: every bit, whatever the shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from executor_service.kernels.image_patches import image_patches
from registry import Normalization
from tests.executor_service.gpu.tensors import DTYPES, ERRORS, SEEDS, poison

pytestmark = pytest.mark.gpu

SHAPES = st.sampled_from([
    (3, 336, 336, 14), (3, 384, 384, 14), (3, 224, 224, 16), (3, 64, 96, 32), (1, 32, 48, 2), (4, 32, 16, 8),
    (3, 30, 30, 15), (3, 20, 20, 7), (3, 28, 44, 14), (1, 5, 5, 5), (2, 70, 64, 32), (3, 128, 128, 64),
])  # fmt: skip
"""Channels, height, width and side of a patch; some for 16-byte accesses, some with remainders, odd or tiny."""


TABLES = st.sampled_from(["random", "straight", "bent"])


def a_table(kind: str, num_channels: int, seed: int) -> torch.Tensor:
    """Random values, those of rescaling and normalising, or these with a single one that is a bit off the line."""
    if kind == "random":
        return torch.randn(num_channels, 256, generator=torch.Generator().manual_seed(seed))
    mean, std = (0.48145466, 0.4578275, 0.40821073, 0.5), (0.26862954, 0.26130258, 0.27577711, 0.5)
    table = torch.from_numpy(Normalization(1 / 255, mean[:num_channels], std[:num_channels]).table.copy())
    if kind == "bent":
        table[seed % num_channels, 1 + seed % 254] *= 1.02
    return table


@settings(max_examples=80)
@given(st.integers(0, 4), SHAPES, st.sampled_from([1, 8, 64]), TABLES, DTYPES, SEEDS)
def test_image_patches(num_tiles: int, shape, multiple: int, kind: str, dtype: torch.dtype, seed: int) -> None:
    num_channels, height, width, patch = shape
    generator = torch.Generator().manual_seed(seed)
    tiles = torch.randint(256, (num_tiles, num_channels, height, width), generator=generator, dtype=torch.uint8)
    table = a_table(kind, num_channels, seed)
    columns = -(-num_channels * patch * patch // multiple) * multiple
    poison()
    got = image_patches(tiles.cuda(), table.cuda(), patch, columns, dtype)
    assert torch.equal(got.cpu(), image_patches(tiles, table, patch, columns, dtype))


def test_tiles_anywhere_in_memory() -> None:
    """A view that begins at an odd address."""
    memory = torch.randint(256, (3 * 32 * 32 + 1,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    table = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    got = image_patches(memory.cuda()[1:].view(1, 3, 32, 32), table.cuda(), 8, 192, torch.float16)
    assert torch.equal(got.cpu(), image_patches(memory[1:].view(1, 3, 32, 32), table, 8, 192, torch.float16))


@pytest.mark.parametrize("dtype", list(ERRORS))
def test_opcheck(dtype: torch.dtype) -> None:
    tiles = torch.randint(256, (2, 3, 28, 48), dtype=torch.uint8, device="cuda")
    table = torch.randn(3, 256).cuda()
    torch.library.opcheck(torch.ops.diptych.image_patches.default, (tiles, table, 14, 592, dtype))
