"""Our tiles, normalised, are the reference's pixels bit for bit: `load_image`, then the PIL-backend processor."""

from __future__ import annotations

import tracemalloc
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from preprocess_service.media.decode import decode_image
from preprocess_service.media.headers import probe_image
from preprocess_service.requests import PlannedItem
from registry import InputContext, MediaInfo, MediaItem, PlaceholderRange
from registry.families import bind_family
from registry.family import ModelFamily
from registry.models import tiles
from registry.models.tiles import TileProcessor
from tests.checkpoints import Checkpoints, processor_config, write_json
from tests.registry.pictures import KINDS, num_frames, rgb

REFERENCES = {"clip": CLIPImageProcessorPil, "siglip": SiglipImageProcessorPil, "llava-pad": LlavaImageProcessorPil}
SIZES = [
    (1, 1), (1, 2), (2, 1), (1, 56), (9, 1), (3, 700), (700, 3), (17, 500), (100, 1000), (1000, 300), (55, 57),
    (56, 56), (57, 55), (112, 113), (333, 500), (336, 336), (337, 335), (384, 384), (480, 640), (640, 480), (800, 81),
]  # fmt: skip
"""(height, width)"""
HALF = {"height": 28, "width": 29}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "not rescaled": ("clip", {"do_rescale": False}),
    "rescaled otherwise": ("clip", {"rescale_factor": 1 / 127.5}),
    "not normalised": ("clip", {"do_normalize": False}),
    "neither": ("clip", {"do_normalize": False, "do_rescale": False}),
    "one mean for all": ("clip", {"image_mean": 0.45, "image_std": 0.3}),
    "not resized": ("clip", {"do_resize": False}),
    "square, not cropped": ("clip", {"do_center_crop": False, "size": {"height": 56, "width": 57}}),
    "square, cropped": ("clip", {"size": {"height": 71, "width": 40}}),
    "sizes as numbers": ("clip", {"size": 56, "crop_size": 56}),
    "smaller odd crop": ("clip", {"crop_size": {"height": 33, "width": 28}}),
    "larger odd crop": ("clip", {"crop_size": {"height": 89, "width": 64}}),
    "larger even crop": ("clip", {"size": {"shortest_edge": 31}, "crop_size": {"height": 90, "width": 90}}),
    "wide crop": ("clip", {"crop_size": {"height": 21, "width": 140}}),
    **{f"resample {number}": ("clip", {"resample": number}) for number in (0, 1, 2, 4, 5)},
    "siglip, cropped": ("siglip", {"do_center_crop": True, "crop_size": HALF}),
    "siglip, bilinear": ("siglip", {"resample": 2}),
    "padded, not cropped": ("llava-pad", {"do_center_crop": False}),
    "padded, black": ("llava-pad", {"image_mean": [0.0, 0.0, 0.0]}),
    "padded, cropped": ("llava-pad", {"crop_size": HALF}),
    "padded to another shape": ("llava-pad", {"size": {"height": 40, "width": 80}, "crop_size": HALF}),
    "not padded after all": ("llava-pad", {"do_pad": False}),
}

pytestmark = pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")


def our_pixels(family: ModelFamily, data: bytes) -> np.ndarray:
    """What the vision tower is given for a file: the preprocess service's tile, normalised by the executor."""
    header = probe_image(data)
    info = MediaInfo.image(header.height, header.width)
    layout = family.layout(info)
    item = PlannedItem(info, layout, PlaceholderRange(0, layout.length), header.format, None, data)
    tile = family.map_item(MediaItem(info, decode_image(item, 0)))["pixel_values"]
    spec = layout.tensors["pixel_values"]
    assert (tile.dtype.name, tile.shape) == (spec.dtype, spec.shape)
    assert spec.normalization is not None
    return spec.normalization.apply(tile)


def reference_pixels(path: Path, processor: str, data: bytes) -> np.ndarray:
    with Image.open(BytesIO(data)) as image:
        picture = load_image(image)
    return REFERENCES[processor].from_pretrained(path)(images=[picture], return_tensors="np")["pixel_values"][0]


@pytest.fixture(scope="session")
def made(checkpoints: Checkpoints) -> Any:
    """(processor, image size) -> the checkpoint's directory and family, made once."""
    known: dict[tuple[str, int], tuple[Path, ModelFamily]] = {}

    def get(processor: str, image_size: int) -> tuple[Path, ModelFamily]:
        if (processor, image_size) not in known:
            path = checkpoints(processor=processor, image_size=image_size)
            known[processor, image_size] = path, bind_family(InputContext.from_checkpoint(path))
        return known[processor, image_size]

    return get


def use_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every resized picture is computed in a window, none as a whole."""
    monkeypatch.setattr(tiles, "MAX_RESIZED_PIXELS", 0)
    monkeypatch.setattr(Image.Image, "resize", lambda *_: pytest.fail("resized as a whole"))


@pytest.mark.parametrize("size", [(45, 61), (61, 44), (1, 9), (130, 70)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file(made, kind: str, size: tuple[int, int]) -> None:
    path, family = made("clip", 56)
    data = KINDS[kind](*size)
    np.testing.assert_array_equal(our_pixels(family, data), reference_pixels(path, "clip", data))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "animated" in kind or "apng" in kind])
def test_the_animated_files_are_animated(kind: str) -> None:
    assert num_frames(KINDS[kind](20, 30)) >= 3


@pytest.mark.parametrize(("processor", "image_size"), [("clip", 336), ("siglip", 384), ("llava-pad", 336)])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_size(made, processor: str, image_size: int, size: tuple[int, int]) -> None:
    path, family = made(processor, image_size)
    data = KINDS["jpeg-orientation-6" if size[0] % 2 else "png-rgb"](*size)
    np.testing.assert_array_equal(our_pixels(family, data), reference_pixels(path, processor, data))


@pytest.mark.parametrize("size", [*SIZES, (1, 1000), (1000, 1)], ids=str)
@pytest.mark.parametrize("in_window", [False, True], ids=["whole", "window"])
def test_every_size_both_ways(made, monkeypatch, in_window: bool, size: tuple[int, int]) -> None:
    path, family = made("clip", 56)
    data = KINDS["png-rgb"](*size)
    with monkeypatch.context() as patch:
        if in_window:
            use_windows(patch)
        ours = our_pixels(family, data)
    np.testing.assert_array_equal(ours, reference_pixels(path, "clip", data))


def test_a_line_of_1000_pixels(made) -> None:
    """The reference resizes it to 336x336000 pixels; ours is a window."""
    path, family = made("clip", 336)
    data = KINDS["png-rgb"](1, 1000)
    np.testing.assert_array_equal(our_pixels(family, data), reference_pixels(path, "clip", data))


@pytest.mark.parametrize("size", [(1, 8192), (8192, 1), (2, 8191)], ids=str)
@pytest.mark.parametrize("resample", [0, 1, 2, 3, 4, 5])
def test_extreme_shapes_need_little_memory(changed_checkpoint, monkeypatch, size, resample: int) -> None:
    """Resized, they would have up to 925 million pixels; a line of one pixel is computed as a line here."""
    path = changed_checkpoint(resample=resample, image_size=336)
    processor = TileProcessor.of(InputContext(path, None, {}, None))
    picture = rgb(*size)
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "resize", lambda *_: pytest.fail("resized as a whole"))
        tracemalloc.start()
        tile = processor.make_tile(picture)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 100e6
    if 1 in size:
        long = 8192 * 336
        line = picture.resize((long, 1) if size[0] == 1 else (1, long), Image.Resampling(resample))
        middle = np.asarray(line).reshape(long, 3)[(long - 336) // 2 :][:336].T
        np.testing.assert_array_equal(tile.mean(axis=1 if size[0] == 1 else 2), middle)


@pytest.mark.parametrize("size", [(70, 95), (95, 70), (40, 30), (203, 33), (20, 201), (7, 7)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_setting(tmp_path, monkeypatch, variant: str, size: tuple[int, int]) -> None:
    processor, changes = VARIANTS[variant]
    write_json(tmp_path / "preprocessor_config.json", processor_config(processor, 56, **changes))
    ours = TileProcessor.of(InputContext(tmp_path, None, {}, None))
    data = KINDS["png-rgb"](*size)
    expected = reference_pixels(tmp_path, processor, data)
    np.testing.assert_array_equal(ours.normalization.apply(ours.make_tile(rgb(*size))), expected)
    if ours.shortest_edge is not None:
        use_windows(monkeypatch)
        np.testing.assert_array_equal(ours.normalization.apply(ours.make_tile(rgb(*size))), expected)


NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "feature extractor": (
        "preprocessor_config.json",
        processor_config("clip", 56, image_processor_type=None, feature_extractor_type="CLIPFeatureExtractor"),
    ),
    "fast": ("preprocessor_config.json", processor_config("clip", 56, image_processor_type="CLIPImageProcessorFast")),
    "nested": ("processor_config.json", {"image_processor": processor_config("clip", 56)}),
}


@pytest.mark.parametrize("name", NAMES)
def test_other_names_of_the_processor(tmp_path, name: str) -> None:
    file, config = NAMES[name]
    write_json(tmp_path / file, config)
    ours = TileProcessor.of(InputContext(tmp_path, None, {}, None))
    reference = CLIPImageProcessorPil(**processor_config("clip", 56))
    expected = reference(images=[rgb(70, 95)], return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(ours.normalization.apply(ours.make_tile(rgb(70, 95))), expected)
