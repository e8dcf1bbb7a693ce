"""The layers of a vision tower: twins of the stock ones, in the same memory, and no more of them than features need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from executor_service.models.fused_tower import fuse_tower
from tests.checkpoints import make_llava_checkpoint
from tests.executor_service.conftest import boot_engine


@pytest.fixture(params=["clip", "siglip"])
def tower(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    checkpoint = make_llava_checkpoint(tmp_path / "model", tower=request.param)
    return boot_engine(checkpoint, decoder="stock").engine.runner.model.hf.model.vision_tower


def layers_of(tower: Any) -> Any:
    return tower.encoder.layers


def hidden_states(tower: Any, seed: int = 0) -> tuple[Tensor, ...]:
    """The embedding of two random pictures and what each layer makes of it, float64."""
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.inference_mode():
        states: tuple[Tensor, ...] = tower(pixels, output_hidden_states=True).hidden_states
    return states


def test_twins(tower: Any) -> None:
    stock = hidden_states(tower)
    fuse_tower(tower, range(len(stock)))
    fused = hidden_states(tower)
    assert len(fused) == len(stock)
    for one, other in zip(fused, stock, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
    assert not torch.allclose(hidden_states(tower, 1)[-1], fused[-1])


@pytest.mark.parametrize(("feature_layer", "num_used"), [(-2, 2), (1, 1), (-1, 3), ([-4, -3], 1), ([0], 0)])
def test_what_nobody_asks_for_is_not_computed(tower: Any, feature_layer: int | list[int], num_used: int) -> None:
    stock, num_layers = hidden_states(tower), len(layers_of(tower))
    assert num_layers == 3
    for layer in layers_of(tower)[num_used:]:
        layer.mlp.fc2.weight.fill_(torch.nan)
    fuse_tower(tower, feature_layer)
    fused = hidden_states(tower)
    assert len(fused) == num_layers + 1
    for one in [feature_layer] if isinstance(feature_layer, int) else feature_layer:
        torch.testing.assert_close(fused[one], stock[one], atol=1e-12, rtol=1e-12)
    assert all(state.isfinite().all() for state in fused)


@pytest.mark.parametrize(("feature_layer", "num_pieces"), [(-1, 2), (-2, 2), ([1, -1], 3), ([0, 2], 2)])
def test_hidden_states_that_nobody_asks_for_take_no_memory(
    tower: Any, feature_layer: int | list[int], num_pieces: int
) -> None:
    """Beside the embedding one, and those that are asked for, whose values stay."""
    stock = hidden_states(tower)
    fuse_tower(tower, feature_layer)
    fused = hidden_states(tower)
    for one in [feature_layer] if isinstance(feature_layer, int) else feature_layer:
        torch.testing.assert_close(fused[one], stock[one], atol=1e-12, rtol=1e-12)
    assert len({state.untyped_storage().data_ptr() for state in fused}) == num_pieces


def test_parameters_stay_what_and_where_they_were(tower: Any) -> None:
    """Under their names; queries', keys' and values' in the memory of one matrix, which is all there is of them."""
    before = {name: parameter.clone() for name, parameter in tower.named_parameters()}
    num_bytes = bytes_of(tower)
    fuse_tower(tower, -1)
    after = dict(tower.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert bytes_of(tower) == num_bytes


def bytes_of(tower: Any) -> int:
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in tower.parameters()}
    return sum(storage.nbytes() for storage in storages.values())


def test_subclasses_are_left_alone(tower: Any) -> None:
    layer = layers_of(tower)[0]

    class Other(type(layer)):
        """It may compute anything."""

    layer.__class__ = Other
    fuse_tower(tower, -1)
    assert "forward" not in vars(layer)
    assert "forward" in vars(layers_of(tower)[1])


def test_masks_are_not_ignored(tower: Any) -> None:
    fuse_tower(tower, -1)
    state = hidden_states(tower)[0]
    with pytest.raises(ValueError, match="take no mask"):
        layers_of(tower)[0](state, torch.zeros(1))
