"""All executors of this service: which one takes the next request, and what they allow together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Final

from diptych.service.errors import UnavailableError
from diptych.v1 import executor_pb2
from preprocess_service.executor_client.executor import Executor
from preprocess_service.planning import RequestLimits
from registry import MediaLimits
from registry.fingerprint import Fingerprint

RETRY_AFTER: Final = 1.0


class ExecutorPool:
    """The executors at `addresses`.

    `own` are this service's limits; `own_counts` the items per prompt its operator set, by modality.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        fingerprint: Fingerprint,
        shares_streams: bool,
        own: MediaLimits,
        on_change: Callable[[], None],
    ) -> None:
        self._own = own
        self._notify = on_change
        self._changed = asyncio.Event()
        self._limits = RequestLimits(own)
        self._executors = [Executor(address, fingerprint, shares_streams, self._on_change) for address in addresses]

    @property
    def ready(self) -> list[Executor]:
        """Executors that take requests now."""
        return [executor for executor in self._executors if executor.is_ready]

    @property
    def model(self) -> executor_pb2.GetModelResponse | None:
        """What a connected executor says of the model."""
        return next(self._models(), None)

    @property
    def num_sent_bytes(self) -> int:
        """Bytes of tensors sent to all executors."""
        return sum(executor.num_sent_bytes for executor in self._executors)

    @property
    def limits(self) -> RequestLimits:
        """The strictest of ours and the connected executors'; the last known while none is connected."""
        return self._limits

    async def wait_ready(self) -> None:
        """Returns with the first compatible executor; IncompatibleError once every one has been refused."""
        while not self.ready:
            self._check_compatible()
            self._changed.clear()
            await self._changed.wait()

    def choose(self) -> Executor:
        """The least loaded executor; IncompatibleError if all were refused, UnavailableError if none is there."""
        ready = self.ready
        if not ready:
            self._check_compatible()
            raise UnavailableError(
                f"no compatible executor is ready (of {len(self._executors)})",
                stage="executor",
                retry_after=RETRY_AFTER,
            )
        return min(ready, key=lambda executor: executor.load)

    async def close(self) -> None:
        """End every connection."""
        await asyncio.gather(*(executor.close() for executor in self._executors))

    def _check_compatible(self) -> None:
        """IncompatibleError naming what differs once every executor has been refused."""
        refused = [executor.incompatible for executor in self._executors if executor.incompatible is not None]
        if len(refused) == len(self._executors):
            raise refused[0]

    def _models(self) -> Iterator[executor_pb2.GetModelResponse]:
        return (executor.model for executor in self._executors if executor.model is not None)

    def _on_change(self) -> None:
        models = [model.limits for model in self._models()]
        if models:
            self._limits = _strictest(self._own, models)
        self._changed.set()
        self._notify()


def _strictest(own: MediaLimits, executors: Sequence[executor_pb2.Limits]) -> RequestLimits:
    """A number of 0 says nothing. Items per prompt are the executors', unless our operator set fewer."""
    counts: dict[str, int] = {}
    for modality in {name for limits in executors for name in limits.max_items_per_prompt}:
        theirs = [limits.max_items_per_prompt.get(modality, 0) for limits in executors]
        counts[modality] = min([*theirs, own.max_items_per_prompt.get(modality, max(theirs))])
    sides = [limits.max_image_side for limits in executors if limits.max_image_side]
    pixels = [limits.max_image_pixels for limits in executors if limits.max_image_pixels]
    lengths = [limits.max_model_len for limits in executors if limits.max_model_len]
    media = replace(
        own,
        max_items_per_prompt=counts,
        max_image_side=min([own.max_image_side, *sides]),
        max_image_pixels=min([own.max_image_pixels, *pixels]),
    )
    return RequestLimits(media, min(lengths, default=None))
