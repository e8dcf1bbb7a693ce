"""Rescaling and normalising by table: numpy's, transformers' and the executor's op agree bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.image_transforms import normalize as hf_normalize
from transformers.image_transforms import rescale as hf_rescale

from executor_service.kernels.normalize import normalize
from registry import Normalization

CLIP = Normalization(1 / 255, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
NORMALIZATIONS = {
    "clip": CLIP,
    "siglip": Normalization(1 / 255, (0.5,) * 3, (0.5,) * 3),
    "not normalised": Normalization(1 / 255, (0.0,) * 3, (1.0,) * 3),
    "not rescaled": Normalization(1.0, CLIP.mean, CLIP.std),
}


def tile(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def op(array: np.ndarray, normalization: Normalization, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    table = torch.from_numpy(normalization.table)
    return normalize(torch.from_numpy(array), table, normalization.channel_axis, dtype)


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_every_level_of_every_channel_is_that_of_transformers(name: str) -> None:
    normalization = NORMALIZATIONS[name]
    levels = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (3, 256, 1)).copy()
    rescaled = hf_rescale(levels, normalization.rescale_factor, input_data_format="channels_first")
    expected = hf_normalize(rescaled, normalization.mean, normalization.std, input_data_format="channels_first")
    np.testing.assert_array_equal(normalization.apply(levels), expected)
    np.testing.assert_array_equal(op(levels, normalization).numpy(), expected)


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 9), min_size=0, max_size=3),
    st.integers(1, 4),
    st.data(),
)
def test_op_equals_apply_for_any_shape_and_channel_axis(others: list[int], channels: int, data) -> None:
    axis = data.draw(st.integers(0, len(others)))
    shape = (*others[:axis], channels, *others[axis:])
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    normalization = Normalization(
        rng.uniform(0.001, 1), tuple(rng.uniform(-1, 1, channels)), tuple(rng.uniform(0.1, 2, channels)), axis
    )
    array = tile(*shape)
    expected = normalization.apply(array)
    assert expected.shape == shape
    np.testing.assert_array_equal(op(array, normalization).numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_the_float32_values_rounded(dtype: torch.dtype) -> None:
    array = tile(3, 17, 23)
    got = op(array, CLIP, dtype)
    assert got.dtype == dtype
    assert torch.equal(got, torch.from_numpy(CLIP.apply(array)).to(dtype))


def test_a_strided_tile_is_normalised_as_it_is_read() -> None:
    turned = torch.from_numpy(tile(5, 6, 3)).permute(2, 0, 1)
    got = normalize(turned, torch.from_numpy(CLIP.table), 0, torch.float32)
    np.testing.assert_array_equal(got.numpy(), CLIP.apply(turned.numpy()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 3, 4, 4)], ids=str)
def test_the_op_is_registered_properly(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    array, axis = torch.from_numpy(tile(*shape)), shape.index(3)
    torch.library.opcheck(torch.ops.diptych.normalize.default, (array, torch.from_numpy(CLIP.table), axis, dtype))
