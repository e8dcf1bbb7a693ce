"""Image bytes to pixels, as `transformers.image_utils.load_image` does it: EXIF applied, RGB, first frame."""

from __future__ import annotations

import asyncio
import os
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from typing import Final

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from diptych.service.errors import InternalError, InvalidInputError
from preprocess_service.requests import PlannedItem
from registry import MediaItem
from registry.errors import RegistryError
from registry.family import ModelFamily

STAGE: Final = "decode"


@dataclass(frozen=True, slots=True)
class MappedItem:
    """The tensors of one item, in the layout's order, and the seconds they took."""

    tensors: dict[str, np.ndarray]
    decode_seconds: float
    map_seconds: float


class MediaWorkers:
    """Decodes and maps items on as many threads as there are cores."""

    def __init__(self, family: ModelFamily, num_threads: int | None = None) -> None:
        self._family = family
        self._pool = ThreadPoolExecutor(num_threads or os.cpu_count() or 1, thread_name_prefix="media")
        use_our_limits()

    async def load(self, item: PlannedItem, index: int) -> MappedItem:
        """The item's tensors; InvalidInputError naming the item if it cannot be decoded."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._load, item, index)

    def close(self) -> None:
        """Drop what has not begun; running threads end by themselves."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _load(self, item: PlannedItem, index: int) -> MappedItem:
        start = time.perf_counter()
        picture = decode_image(item, index)
        decoded = time.perf_counter()
        try:
            tensors = self._family.map_item(MediaItem(item.info, picture))
        except RegistryError as error:
            raise InternalError(f"item {index}: {error}", stage="map", item=index) from error
        return MappedItem(tensors, decoded - start, time.perf_counter() - decoded)


def use_our_limits() -> None:
    """Pillow's guesses at decompression bombs give way to the exact check that every probed header passes."""
    Image.MAX_IMAGE_PIXELS = None
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\..*")


def decode_image(item: PlannedItem, index: int) -> Image.Image:
    """The item's picture in mode RGB, of exactly the size its header promised."""
    assert item.data is not None
    height, width = item.info.size
    try:
        with Image.open(BytesIO(item.data), formats=(item.image_format,)) as file:
            # Before any pixel: a file that Pillow reads as larger than the header walk did is not decoded.
            _check_size(sorted(file.size), sorted((width, height)), index)
            picture = ImageOps.exif_transpose(file).convert("RGB")
    except InvalidInputError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever their parser meets: SyntaxError, struct.error, …
        raise InvalidInputError(
            f"item {index}: the {item.image_format} image cannot be decoded: {_reason(error)}", stage=STAGE, item=index
        ) from error
    _check_size(list(picture.size), [width, height], index)
    return picture


def _check_size(actual: list[int], promised: list[int], index: int) -> None:
    if actual != promised:
        raise InvalidInputError(
            f"item {index}: the image decodes to {actual[0]}x{actual[1]} pixels, its header says "
            f"{promised[0]}x{promised[1]}",
            stage=STAGE,
            item=index,
        )


def _reason(error: Exception) -> str:
    """The error's own text without addresses of objects, which mean nothing to a client."""
    if isinstance(error, UnidentifiedImageError):
        return "its data is not what its header says"
    return str(error) or type(error).__name__
