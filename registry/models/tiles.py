"""Pictures to uint8 tiles: what CLIP-like image processors do before they rescale and normalise.

The pixels are those of transformers' PIL image processors, bit for bit (with the Pillow the project
names); only rescaling and normalising are left to the executor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Final

import numpy as np
from PIL import Image

from registry.context import InputContext
from registry.errors import CheckpointError
from registry.layout import Normalization
from registry.models.resample import RESAMPLING, resize_window

SUPPORTED_PROCESSORS: Final = ("CLIPImageProcessor", "SiglipImageProcessor", "LlavaImageProcessor")
SIZE_KEYS: Final = ("shortest_edge", "longest_edge", "height", "width", "max_height", "max_width")
MAX_RESIZED_PIXELS: Final = 16 * 1024 * 1024
"""Above this many pixels only the window that the crop keeps is computed."""


@dataclass(frozen=True)
class TileProcessor:
    """The checkpoint's image processor, as far as it touches uint8 pixels.

    `shortest_edge` or `resize_to` (height, width) says how pictures are scaled, `crop_to` (height, width)
    what is cut from their middle, `pad_color` fills a picture up to a square first; `convert_to_rgb`
    is the processor's own. None: not done.
    """

    shortest_edge: int | None
    resize_to: tuple[int, int] | None
    crop_to: tuple[int, int] | None
    pad_color: tuple[int, int, int] | None
    resample: Image.Resampling
    normalization: Normalization
    convert_to_rgb: Callable[[Image.Image], Any] | None = None

    @classmethod
    def of(cls, ctx: InputContext) -> TileProcessor:
        """The processor of a checkpoint, made once; CheckpointError names what is not supported."""
        return ctx.remember(cls.read)

    @classmethod
    def read(cls, ctx: InputContext, supported: Sequence[str] = SUPPORTED_PROCESSORS) -> TileProcessor:
        """The processor of a checkpoint, if it is one of `supported` by name."""
        processor = ctx.image_processor
        name = type(processor).__name__.removesuffix("Pil")
        if name not in supported:
            raise CheckpointError(f"{name} is not supported here; supported: {', '.join(supported)}")
        pad_color = _pad_color(processor) if name == "LlavaImageProcessor" and processor.do_pad else None
        if pad_color is None and processor.do_pad and processor.pad_size:
            raise CheckpointError(f"{name} with a pad_size is not supported")
        shortest_edge, resize_to = _resizing(processor)
        if shortest_edge is not None and pad_color is not None:
            resize_to = (shortest_edge, shortest_edge)
            shortest_edge = None
        crop = processor.crop_size if getattr(processor, "do_center_crop", None) else None
        tiles = cls(
            shortest_edge=shortest_edge,
            resize_to=resize_to,
            crop_to=_height_width(crop),
            pad_color=pad_color,
            resample=_resample(processor),
            normalization=_normalization(processor),
            convert_to_rgb=processor.convert_to_rgb if processor.do_convert_rgb else None,
        )
        tiles._check_fixed_size()
        return tiles

    @property
    def tile_size(self) -> tuple[int, int]:
        """(height, width) of every tile in pixels."""
        size = self.crop_to or self.resize_to
        assert size is not None
        return size

    def make_tile(self, picture: Image.Image) -> np.ndarray:
        """An RGB picture of any size -> uint8 [3, H, W]."""
        picture = self.flatten(picture)
        if self.pad_color is not None:
            picture = _pad_to_square(picture, self.pad_color)
        height, width = self._resized_size(picture)
        if self._resizes and self.crop_to is not None and height * width > MAX_RESIZED_PIXELS:
            pixels = self._window_of(picture, height, width)
        else:
            resized = picture.resize((width, height), self.resample) if self._resizes else picture
            pixels = self._crop(np.asarray(resized))
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def flatten(self, picture: Image.Image) -> Image.Image:
        """The picture after the processor's own conversion to RGB.

        It is RGB already, but newer processors lay it over white where it has the colour that its file calls
        transparent.
        """
        if self.convert_to_rgb is None or picture.info.get("transparency") is None:
            return picture
        return Image.fromarray(np.asarray(self.convert_to_rgb(picture)))

    @property
    def _resizes(self) -> bool:
        return self.shortest_edge is not None or self.resize_to is not None

    def _check_fixed_size(self) -> None:
        if self.crop_to is None and self.resize_to is None:
            raise CheckpointError("the image processor gives tiles of varying size; a fixed crop or size is needed")

    def _resized_size(self, picture: Image.Image) -> tuple[int, int]:
        """(height, width) after resizing; the arithmetic is `get_resize_output_image_size`'s."""
        if self.resize_to is not None:
            return self.resize_to
        width, height = picture.size
        if self.shortest_edge is None:
            return height, width
        short, long = min(height, width), max(height, width)
        new_long = int(self.shortest_edge * long / short)
        return (new_long, self.shortest_edge) if width <= height else (self.shortest_edge, new_long)

    def _window_of(self, picture: Image.Image, height: int, width: int) -> np.ndarray:
        assert self.crop_to is not None
        crop_height, crop_width = (min(crop, side) for crop, side in zip(self.crop_to, (height, width), strict=True))
        top, left = (height - crop_height) // 2, (width - crop_width) // 2
        window = (left, top, left + crop_width, top + crop_height)
        return self._crop(resize_window(np.asarray(picture), (height, width), window, self.resample))

    def _crop(self, pixels: np.ndarray) -> np.ndarray:
        """Cut the middle out of [H, W, 3]; black borders where it is too small, as `center_crop` does."""
        if self.crop_to is None:
            return pixels
        (height, width), (crop_height, crop_width) = pixels.shape[:2], self.crop_to
        top, left = (height - crop_height) // 2, (width - crop_width) // 2
        if top >= 0 and left >= 0:
            return pixels[top : top + crop_height, left : left + crop_width]
        canvas_height, canvas_width = max(crop_height, height), max(crop_width, width)
        canvas = np.zeros((canvas_height, canvas_width, 3), dtype=np.uint8)
        top_pad, left_pad = ceil((canvas_height - height) / 2), ceil((canvas_width - width) / 2)
        canvas[top_pad : top_pad + height, left_pad : left_pad + width] = pixels
        top, left = max(0, top + top_pad), max(0, left + left_pad)
        return canvas[top : top + crop_height, left : left + crop_width]


def _resizing(processor: Any) -> tuple[int | None, tuple[int, int] | None]:
    """(shortest edge, None), (None, (height, width)), or twice None where nothing is resized."""
    if not processor.do_resize:
        return None, None
    size = {key: value for key in SIZE_KEYS if (value := getattr(processor.size, key, None))}
    if size.keys() == {"shortest_edge"}:
        return int(size["shortest_edge"]), None
    if size.keys() == {"height", "width"}:
        return None, (int(size["height"]), int(size["width"]))
    raise CheckpointError(
        f"an image processor that resizes to {size or None} is not supported; supported: shortest_edge, or height "
        "and width"
    )


def _resample(processor: Any) -> Image.Resampling:
    """The filter; any where nothing is resized."""
    if not processor.do_resize:
        return Image.Resampling.BICUBIC
    if not isinstance(processor.resample, int) or processor.resample not in RESAMPLING:
        raise CheckpointError(
            f"an image processor with resample {processor.resample!r} is not supported; supported: "
            f"{', '.join(f'{int(known)} ({known.name})' for known in RESAMPLING)}"
        )
    return Image.Resampling(processor.resample)


def _height_width(size: Any) -> tuple[int, int] | None:
    if size is None or not (size.height and size.width):
        return None
    return int(size.height), int(size.width)


def _pad_color(processor: Any) -> tuple[int, int, int]:
    mean = processor.image_mean or (0.0, 0.0, 0.0)
    red, green, blue = (int(value * 255) for value in mean)
    return red, green, blue


def _pad_to_square(picture: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    width, height = picture.size
    if width == height:
        return picture
    side = max(width, height)
    square = Image.new("RGB", (side, side), color)
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    return square


def _normalization(processor: Any) -> Normalization:
    scale = float(processor.rescale_factor) if processor.do_rescale else 1.0
    if not processor.do_normalize:
        return Normalization(scale, (0.0,) * 3, (1.0,) * 3)
    return Normalization(scale, _per_channel(processor, "image_mean"), _per_channel(processor, "image_std"))


def _per_channel(processor: Any, name: str) -> tuple[float, ...]:
    value = getattr(processor, name)
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * 3
    if len(values) != 3 or not all(isinstance(number, int | float) for number in values):
        raise CheckpointError(f"the image processor's {name} is {value}; it must be a number or one for each of RGB")
    return tuple(float(number) for number in values)
