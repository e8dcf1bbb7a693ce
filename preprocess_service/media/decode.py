"""Media bytes to pixels and samples, on worker threads.

Pictures as `transformers.image_utils.load_image` reads them: EXIF applied, RGB, first frame.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from typing import Any, Final

import numpy as np
from PIL import Image, ImageOps

from diptych.service.errors import InternalError, InvalidInputError
from diptych.service.telemetry import stage
from preprocess_service.media.decode_audio import decode_audio
from preprocess_service.media.decode_errors import check_picture_size, undecodable
from preprocess_service.media.decode_video import decode_video
from preprocess_service.requests import MappedItem, PlannedItem
from registry import MediaItem
from registry.errors import RegistryError
from registry.family import ModelFamily


class MediaWorkers:
    """Decodes and maps items on as many threads as there are cores."""

    def __init__(self, family: ModelFamily, num_threads: int | None = None) -> None:
        self._family = family
        self._num_threads = num_threads or os.cpu_count() or 1
        self._num_early = 0
        self._pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="media")
        use_our_limits()

    def load(self, item: PlannedItem, index: int) -> asyncio.Future[MappedItem]:
        """The item's tensors, which a worker begins with; InvalidInputError naming the item if it cannot be decoded."""
        # The pool's threads do not know the request; its context does.
        load = partial(contextvars.copy_context().run, self._load, item, index)
        return asyncio.get_running_loop().run_in_executor(self._pool, load)

    def take_early(self) -> bool:
        """Whether one more item may be loaded before the executor asks for it; then it is given back in the end.

        There are as many as workers: a busy service gains nothing by it, and an executor without room must not fill
        this one's memory.
        """
        if self._num_early >= self._num_threads:
            return False
        self._num_early += 1
        return True

    def give_back_early(self) -> None:
        """The item is with the stream, or not wanted."""
        self._num_early -= 1

    def close(self) -> None:
        """Drop what has not begun; running threads end by themselves."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _load(self, item: PlannedItem, index: int) -> MappedItem:
        start = time.perf_counter()
        with stage("decode", item=index, modality=item.info.modality):
            data = _DECODERS[item.info.modality](item, index)
        decoded = time.perf_counter()
        with stage("map", item=index):
            tensors = self._map(MediaItem(item.info, data), index)
        return MappedItem(tensors, decoded - start, time.perf_counter() - decoded)

    def _map(self, item: MediaItem, index: int) -> dict[str, np.ndarray]:
        try:
            return self._family.map_item(item)
        except RegistryError as error:
            raise InternalError(f"item {index}: {error}", stage="map", item=index) from error


def use_our_limits() -> None:
    """Pillow's guesses at decompression bombs give way to the exact check that every probed header passes."""
    Image.MAX_IMAGE_PIXELS = None
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\..*")


def decode_image(item: PlannedItem, index: int) -> Image.Image:
    """The item's picture in mode RGB, of exactly the size its header promised."""
    assert item.data is not None
    height, width = item.info.size
    try:
        with Image.open(BytesIO(item.data), formats=(item.file_format,)) as file:
            # Before any pixel: a file that Pillow reads as larger than the header walk did is not decoded.
            check_picture_size(sorted(file.size), sorted((width, height)), index)
            picture = ImageOps.exif_transpose(file).convert("RGB")
    except InvalidInputError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever their parser meets: SyntaxError, struct.error, …
        raise undecodable(index, f"{item.file_format} image", error) from error
    check_picture_size(list(picture.size), [width, height], index)
    return picture


_DECODERS: Final[Mapping[str, Callable[[PlannedItem, int], Any]]] = {
    "image": decode_image,
    "video": decode_video,
    "audio": decode_audio,
}
