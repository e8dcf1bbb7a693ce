"""A request's items on their way to the executor: decoded, mapped and handed to its stream.

Nothing is sent before the executor says that it misses it. But what it has surely never seen is loaded meanwhile: the
answer takes a trip there and back. Of requests that share a stream only the first is asked for an item, so the others
do not load it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

from diptych.service.errors import DiptychError, InternalError
from preprocess_service.executor_client import Executor, RemoteRequest
from preprocess_service.media.decode import MediaWorkers
from preprocess_service.requests import MappedItem, Plan

LOG: Final = logging.getLogger("diptych.preprocess")


class ItemSender:
    """One answer's items. `on_loaded` is told of each that was decoded and mapped for it."""

    def __init__(
        self,
        plan: Plan,
        media: MediaWorkers,
        executor: Executor,
        on_loaded: Callable[[MappedItem], None],
    ) -> None:
        self._items = plan.items
        self._media = media
        self._executor = executor
        self._on_loaded = on_loaded
        self._early: dict[int, asyncio.Future[MappedItem]] = {}
        self._promised: set[bytes] = set()
        self._asked_for: set[int] = set()
        self._senders: list[asyncio.Task[None]] = []

    @property
    def is_done(self) -> bool:
        """Whether all that was asked for is with the stream."""
        return all(sender.done() for sender in self._senders)

    def begin(self) -> None:
        """Load what the executor will ask for, as far as there are workers for it."""
        for index, item in enumerate(self._items):
            digest = item.media_digest
            if item.mapped is not None or digest is None or digest in self._promised or self._executor.expects(digest):
                continue
            self._promised.add(digest)
            self._executor.promise(digest)
            if self._media.take_early():
                self._early[index] = self._media.load(item, index)

    def send(self, indices: Sequence[int], remote: RemoteRequest) -> None:
        """Send what the executor misses; what it turned out to have is dropped.

        It may ask a second time: for an item that was on its way for another request, which has ended.
        """
        self._asked_for.update(indices)
        for index, item in enumerate(self._items):
            if index not in self._asked_for and item.media_digest is not None:
                self._executor.note_seen(item.media_digest)
                self._drop(index)
        self._senders.append(asyncio.create_task(self._send(indices, remote)))

    def cancel(self) -> None:
        """Stop all that is not done."""
        for index in list(self._early):
            self._drop(index)
        for digest in self._promised:
            self._executor.withdraw(digest)
        for sender in self._senders:
            sender.cancel()

    async def _send(self, indices: Sequence[int], remote: RemoteRequest) -> None:
        """Every item as soon as it is ready; the first failure ends the request."""
        tasks = [asyncio.create_task(self._send_item(index, remote)) for index in indices]
        try:
            await asyncio.gather(*tasks)
        except DiptychError as error:
            remote.fail(error)
        except Exception:
            LOG.exception("unexpected error while decoding or mapping")
            remote.fail(InternalError("internal error; the server's log has the details", stage="decode"))
        finally:
            for task in tasks:
                task.cancel()

    async def _send_item(self, index: int, remote: RemoteRequest) -> None:
        if index >= len(self._items):
            raise InternalError(f"the executor asks for item {index} of {len(self._items)}", stage="decode")
        item = self._items[index]
        mapped = await self._load(index)
        self._on_loaded(mapped)
        for tensor_index, name in enumerate(item.tensors):
            remote.send_tensor(index, tensor_index, mapped.tensors[name])
        if item.media_digest is not None:
            self._executor.note_seen(item.media_digest)

    async def _load(self, index: int) -> MappedItem:
        item = self._items[index]
        if item.mapped is not None:
            return item.mapped
        if index not in self._early:
            return await self._media.load(item, index)
        try:
            return await self._early[index]
        finally:
            self._drop(index)

    def _drop(self, index: int) -> None:
        loading = self._early.pop(index, None)
        if loading is None:
            return
        self._media.give_back_early()
        loading.cancel()
        # Its failure is nobody's any more: an executor that does not want the item does not need it whole.
        loading.add_done_callback(lambda done: done.cancelled() or done.exception())
