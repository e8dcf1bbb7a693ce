"""A tower's first layer as a product: the features of its convolution, from levels as from pixel values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from executor_service.layers.activations import QuickGelu
from executor_service.layers.patches import Levels, PatchProduct
from executor_service.models.llava import LlavaModel
from tests.checkpoints import make_llava_checkpoint
from tests.executor_service.conftest import boot_engine

TOLERANCES = {"float64": 1e-12, "float32": 1e-5}


def tiles(count: int, seed: int) -> list[Levels]:
    """Pictures of one tile each, with one table."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(256, (count, 3, 56, 56), generator=generator, dtype=torch.uint8)
    table = torch.randn(3, 256, generator=generator)
    return [Levels(tile, table, 0) for tile in levels]


def features(model: Any, levels: list[Levels | Tensor]) -> Tensor:
    with torch.inference_mode():
        return torch.stack(list(model.embed_multimodal(levels)))


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize(("tower", "strategy"), [("clip", "default"), ("siglip", "full")])
def test_twins(tmp_path: Path, tower: Any, strategy: Any, dtype: str) -> None:
    checkpoint = make_llava_checkpoint(tmp_path / "model", tower=tower, select_strategy=strategy)
    model: Any = boot_engine(checkpoint, decoder="stock", dtype=dtype).engine.runner.model
    levels = tiles(3, 0)
    pixels = [one.normalized(getattr(torch, dtype)) for one in levels]
    stock = features(model, pixels)
    assert torch.equal(features(model, levels), stock), "without a product, levels are normalised"
    assert model.fuse_decoder()
    assert isinstance(model.patch_product, PatchProduct)
    assert any(isinstance(module, QuickGelu) for module in model.modules()) == (tower == "clip")
    tolerance = {"atol": TOLERANCES[dtype], "rtol": TOLERANCES[dtype]}
    torch.testing.assert_close(features(model, levels), stock, **tolerance)
    torch.testing.assert_close(features(model, pixels), stock, **tolerance)
    assert not torch.allclose(features(model, tiles(3, 1)), stock)


def test_tables_may_differ(tmp_path: Path) -> None:
    model: Any = boot_engine(make_llava_checkpoint(tmp_path / "model"), decoder="fused").engine.runner.model
    levels = [*tiles(1, 0), *tiles(1, 1)]
    alone = torch.cat([features(model, [one]) for one in levels])
    torch.testing.assert_close(features(model, levels), alone, atol=1e-10, rtol=1e-10)


def test_pictures_of_several_tiles(tmp_path: Path) -> None:
    checkpoint = make_llava_checkpoint(tmp_path / "model", pinpoints=[[56, 112], [112, 112]])
    model: Any = boot_engine(checkpoint, decoder="stock").engine.runner.model
    sizes = [torch.tensor([50, 100]), torch.tensor([100, 90])]
    table = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    levels = [Levels(torch.stack([one.tensor for one in tiles(count, count)]), table, 1) for count in (3, 5)]
    pixels = [one.normalized(torch.float64) for one in levels]
    with torch.inference_mode():
        stock = model.embed_multimodal(pixels, sizes)
        model.fuse_decoder()
        fused = model.embed_multimodal(levels, sizes)
    for one, other in zip(fused, stock, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_the_weight_stays_where_it_was_asked_for(tmp_path: Path) -> None:
    """Under its name, and in no memory but the product's."""
    model: Any = boot_engine(make_llava_checkpoint(tmp_path / "model"), decoder="stock").engine.runner.model
    before = {name: parameter.clone() for name, parameter in model.hf.model.vision_tower.named_parameters()}
    model.fuse_decoder()
    after = dict(model.hf.model.vision_tower.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    product = model.patch_product
    assert product.weight.untyped_storage().data_ptr() == product.matrix.untyped_storage().data_ptr()


def test_a_tower_that_looks_at_pixels_sees_none(tmp_path: Path) -> None:
    """Nothing goes unnoticed if a tower is not of the shape that was thought."""
    model: Any = boot_engine(make_llava_checkpoint(tmp_path / "model"), decoder="fused").engine.runner.model
    (one,) = tiles(1, 0)
    pixels = model.patch_product.pixels_of(one.tensor[None], one.table)
    assert pixels.shape == (1, 3, 56, 56)
    assert pixels.isnan().all()
    assert model.patch_product(pixels.clone()).isnan().all()


def test_the_mark_is_the_methods() -> None:
    class Other(LlavaModel):
        def embed_multimodal(self, pixel_values): ...

    assert getattr(LlavaModel.embed_multimodal, "takes_levels", False)
    assert not getattr(Other.embed_multimodal, "takes_levels", False)


def test_other_towers_are_left_alone() -> None:
    tower = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2, 2))
    assert PatchProduct.install(tower) is None
    assert isinstance(tower[0], torch.nn.Conv2d)
