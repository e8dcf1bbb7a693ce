"""Tensor maps: how Hopper's copy engine finds boxes of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import torch

_KEPT: Final = 4096
"""A model's weights, and x where the allocator puts it."""


@lru_cache(_KEPT)
def tensor_map(
    address: int, dtype: torch.dtype, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]
) -> Any:
    """Boxes of a tensor of a 16-bit dtype, its last dimension named first, as the driver wants it; for `BY_VALUE`.

    `strides` are bytes, of all dimensions but the first, which is dense: multiples of 16, as the address. A box's first
    dimension is 128 bytes; in shared memory these are rows, swizzled as the tensor cores of Hopper read them. What of
    a box is outside of the tensor becomes zeros.
    """
    from cuda.bindings import driver

    types = driver.CUtensorMapDataType
    is_bfloat16 = dtype == torch.bfloat16
    status, encoded = driver.cuTensorMapEncodeTiled(
        types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if is_bfloat16 else types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        len(sizes),
        address,
        [driver.cuuint64_t(n) for n in sizes],
        [driver.cuuint64_t(n) for n in strides],
        [driver.cuuint32_t(n) for n in box],
        [driver.cuuint32_t(1)] * len(sizes),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_NONE,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if status.value:
        raise RuntimeError(f"a tensor of sizes {tuple(sizes)} can have no tensor map: {status.name}")
    return encoded
