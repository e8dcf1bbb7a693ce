"""Media bytes to pixels and samples, on worker threads.

Pictures as `transformers.image_utils.load_image` reads them: EXIF applied, RGB, first frame.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import queue
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class _Job:
    """An item to load, and who waits for it. The threads do not know the request; its context does."""

    loading: asyncio.Future[MappedItem]
    context: contextvars.Context
    item: PlannedItem
    index: int


class MediaWorkers:
    """Decodes and maps items on as many threads as there are cores.

    The threads are our own: an executor's two futures for a job, and the locks of one, cost a tenth of a millisecond.
    """

    def __init__(self, family: ModelFamily, num_threads: int | None = None) -> None:
        self._family = family
        self._num_threads = num_threads or os.cpu_count() or 1
        self._num_early = 0
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        for index in range(self._num_threads):
            threading.Thread(target=self._work, name=f"media_{index}", daemon=True).start()
        use_our_limits()

    def load(self, item: PlannedItem, index: int) -> asyncio.Future[MappedItem]:
        """The item's tensors, which a worker begins with; InvalidInputError naming the item if it cannot be decoded."""
        loading: asyncio.Future[MappedItem] = asyncio.get_running_loop().create_future()
        self._jobs.put(_Job(loading, contextvars.copy_context(), item, index))
        return loading

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
        with contextlib.suppress(queue.Empty):
            while True:
                if (job := self._jobs.get_nowait()) is not None:
                    job.loading.cancel()
        for _ in range(self._num_threads):
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if job.loading.cancelled():
                continue
            outcome: MappedItem | Exception
            try:
                outcome = job.context.run(self._load, job.item, job.index)
            except Exception as error:
                outcome = error
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                job.loading.get_loop().call_soon_threadsafe(_settle, job.loading, outcome)
            del job, outcome  # which may hold a large file, and what has become of it

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


def _settle(loading: asyncio.Future[MappedItem], outcome: MappedItem | Exception) -> None:
    if loading.done():
        return
    if isinstance(outcome, Exception):
        loading.set_exception(outcome)
    else:
        loading.set_result(outcome)


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
