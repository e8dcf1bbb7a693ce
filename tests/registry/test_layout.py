"""Item layouts whose replacement is not features alone."""

from __future__ import annotations

import numpy as np
import pytest

from registry import ItemLayout, PlaceholderRange, Run, TensorSpec

LAYOUT = ItemLayout(
    replacement=(Run(6, 1, False), Run(3, 4), Run(7, 2, False), Run(3, 4), Run(9, 1)),
    tensors={"pixels": TensorSpec("uint8", (3, 5, 7)), "mask": TensorSpec("int64", (2,))},
    constants={"grid": np.array([2, 4])},
)


def test_separators_are_tokens_but_not_features() -> None:
    assert LAYOUT.token_ids == [6, 3, 3, 3, 3, 7, 7, 3, 3, 3, 3, 9]
    np.testing.assert_array_equal(LAYOUT.feature_mask, [0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1])
    assert LAYOUT.feature_mask.dtype == bool
    assert LAYOUT.length == 12
    assert LAYOUT.num_tokens == LAYOUT.feature_mask.sum() == 9


def test_bytes_are_those_of_the_tensors_without_constants() -> None:
    assert LAYOUT.num_bytes == 3 * 5 * 7 + 2 * 8


@pytest.mark.parametrize(("dtype", "size"), [("bool", 1), ("bfloat16", 2), ("float32", 4), ("float64", 8)])
def test_bytes_of_a_dtype(dtype: str, size: int) -> None:
    assert TensorSpec(dtype, (2, 3)).num_bytes == 6 * size
    assert TensorSpec(dtype, ()).num_bytes == size


def test_a_run_of_no_tokens_adds_none() -> None:
    layout = ItemLayout((Run(6, 0, False), Run(3, 2)), {})
    assert layout.token_ids == [3, 3]
    assert layout.feature_mask.tolist() == [True, True]


def test_end_of_a_placeholder_range() -> None:
    assert PlaceholderRange(5, 12).end == 17
