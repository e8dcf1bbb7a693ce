"""A request's items on their way to the executor: decoded, mapped and handed to its stream.

Nothing is sent before the executor says that it misses it. But what it has surely never seen is loaded meanwhile: the
answer takes a trip there and back.
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
        remote: RemoteRequest,
        on_loaded: Callable[[MappedItem], None],
    ) -> None:
        self._items = plan.items
        self._media = media
        self._executor = executor
        self._remote = remote
        self._on_loaded = on_loaded
        self._early: dict[int, asyncio.Task[MappedItem]] = {}
        self._asked_for: set[int] = set()
        self._senders: list[asyncio.Task[None]] = []

    @property
    def is_done(self) -> bool:
        """Whether all that was asked for is with the stream."""
        return all(sender.done() for sender in self._senders)

    def begin(self) -> None:
        """Load the items that the executor cannot have, as far as there are workers for it."""
        seen: set[bytes] = set()
        for index, item in enumerate(self._items):
            digest = item.media_digest
            if item.mapped is not None or digest is None or digest in seen or self._executor.has_seen(digest):
                continue
            if not self._media.take_early():
                return
            seen.add(digest)
            self._early[index] = asyncio.create_task(self._media.load(item, index))

    def send(self, indices: Sequence[int]) -> None:
        """Send what the executor misses; what it turned out to have is dropped.

        It may ask a second time: for an item that was on its way for another request, which has ended.
        """
        self._asked_for.update(indices)
        for index in self._early.keys() - self._asked_for:
            self._drop(index)
        self._senders.append(asyncio.create_task(self._send(indices)))

    def cancel(self) -> None:
        """Stop all that is not done."""
        for index in list(self._early):
            self._drop(index)
        for sender in self._senders:
            sender.cancel()

    async def _send(self, indices: Sequence[int]) -> None:
        """Every item as soon as it is ready; the first failure ends the request."""
        tasks = [asyncio.create_task(self._send_item(index)) for index in indices]
        try:
            await asyncio.gather(*tasks)
        except DiptychError as error:
            self._remote.fail(error)
        except Exception:
            LOG.exception("unexpected error while decoding or mapping")
            self._remote.fail(InternalError("internal error; the server's log has the details", stage="decode"))
        finally:
            for task in tasks:
                task.cancel()

    async def _send_item(self, index: int) -> None:
        if index >= len(self._items):
            raise InternalError(f"the executor asks for item {index} of {len(self._items)}", stage="decode")
        item = self._items[index]
        mapped = await self._load(index)
        self._on_loaded(mapped)
        for tensor_index, name in enumerate(item.tensors):
            self._remote.send_tensor(index, tensor_index, mapped.tensors[name])
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
        task = self._early.pop(index, None)
        if task is None:
            return
        self._media.give_back_early()
        task.cancel()
        # Its failure is nobody's any more: an executor that does not want the item does not need it whole.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
