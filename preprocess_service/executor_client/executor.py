"""The connection to one executor: handshake, load, streams; it comes back by itself after a loss."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, Final

import grpc

from diptych.service.errors import IncompatibleError
from diptych.service.lifecycle import CHANNEL_OPTIONS
from diptych.v1 import executor_pb2
from diptych.v1.executor_pb2_grpc import ExecutorServiceStub
from diptych.wire.media import fingerprint_from_proto
from preprocess_service.executor_client.request import RemoteRequest
from preprocess_service.executor_client.stream import ExecutorStream
from registry.fingerprint import Fingerprint

LOG = logging.getLogger("diptych.preprocess.executor")
FIRST_BACKOFF: Final = 0.1
MAX_BACKOFF: Final = 1.0
HANDSHAKE_TIMEOUT: Final = 5.0
LOAD_INTERVAL_MS: Final = 200
MAX_SEEN: Final = 65_536
_OPTIONS: Final = (
    *CHANNEL_OPTIONS,
    # A dead executor may be back any moment; grpc's own backoff would grow to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


class Executor:
    """One address. `model` is what it serves once the handshake is done, None while it is not usable.

    `num_sent_bytes` are those of tensors, on all its streams.
    """

    def __init__(
        self, address: str, fingerprint: Fingerprint, shares_stream: bool, on_change: Callable[[], None]
    ) -> None:
        self.address = address
        self.model: executor_pb2.GetModelResponse | None = None
        self.incompatible: IncompatibleError | None = None
        self._fingerprint = fingerprint
        self._shares_stream = shares_stream
        self._on_change = on_change
        self._channel: Any = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._stub: Any = ExecutorServiceStub(self._channel)
        self._load: executor_pb2.WatchLoadResponse | None = None
        self._streams: list[ExecutorStream] = []
        self._num_live = 0
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._promised: set[bytes] = set()
        self.num_sent_bytes = 0
        self._task = asyncio.create_task(self._keep_connected())

    @property
    def is_ready(self) -> bool:
        """Whether requests may be sent."""
        return self.model is not None and (self._load is None or self._load.accepting)

    @property
    def load(self) -> int:
        """Requests it has, as far as we know: what it says, or what we gave it if that is more."""
        said = self._load
        return max(self._num_live, said.num_running + said.num_waiting + said.num_receiving if said else 0)

    @contextlib.contextmanager
    def request(self, start: executor_pb2.Start) -> Iterator[RemoteRequest]:
        """A request on it; when the block ends, however it does, the executor is told if it is not done."""
        remote = self._stream().start(start)
        self._num_live += 1
        try:
            yield remote
        finally:
            self._num_live -= 1
            remote.release()

    def expects(self, media_digest: bytes) -> bool:
        """Whether it will hardly ask a new request for this file: it had it, or another is to send it on the stream."""
        return self.has_seen(media_digest) or (self._shares_stream and media_digest in self._promised)

    def promise(self, media_digest: bytes) -> None:
        """A request that is about to start has this file."""
        self._promised.add(media_digest)

    def withdraw(self, media_digest: bytes) -> None:
        """The request has sent the file, or never will."""
        self._promised.discard(media_digest)

    def has_seen(self, media_digest: bytes) -> bool:
        """Whether it has had this file before, on this connection; it may have forgotten it since."""
        return media_digest in self._seen

    def note_seen(self, media_digest: bytes) -> None:
        """It has been sent this file, or did not miss it."""
        self._seen[media_digest] = None
        self._seen.move_to_end(media_digest)
        if len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)

    async def close(self) -> None:
        """End every stream and the connection."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await asyncio.gather(*(stream.close() for stream in self._streams))
        await self._channel.close()

    # --- streams ----------------------------------------------------------------------------------

    def _stream(self) -> ExecutorStream:
        self._streams = [stream for stream in self._streams if stream.is_open]
        if self._shares_stream and self._streams:
            return self._streams[0]
        stream = ExecutorStream(self._channel, self.address, not self._shares_stream, self._count_sent)
        self._streams.append(stream)
        return stream

    def _count_sent(self, num_bytes: int) -> None:
        self.num_sent_bytes += num_bytes

    # --- connection -------------------------------------------------------------------------------

    async def _keep_connected(self) -> None:
        backoff = FIRST_BACKOFF
        while True:
            reason = "it is incompatible"
            try:
                self._accept(await self._stub.GetModel(executor_pb2.GetModelRequest(), timeout=HANDSHAKE_TIMEOUT))
                if self.model is not None:
                    backoff = FIRST_BACKOFF
                    await self._follow_load()
                    reason = "it closed the connection"
            except grpc.RpcError as error:
                reason = f"{error.code().name}: {error.details()}"
            except Exception:
                LOG.exception("unexpected error with executor %s; trying again", self.address)
                reason = "an unexpected error"
            self._disconnect(reason, is_first=backoff == FIRST_BACKOFF)
            # Spread, so that many preprocess services do not come back in step.
            await asyncio.sleep(backoff * random.uniform(0.75, 1.25))  # noqa: S311
            backoff = min(backoff * 2, MAX_BACKOFF)

    def _accept(self, model: executor_pb2.GetModelResponse) -> None:
        theirs = fingerprint_from_proto(model.fingerprint)
        differences = self._fingerprint.differences(theirs)
        if not differences and theirs.digest != self._fingerprint.digest:
            differences = ["fingerprint"]
        if differences:
            self._refuse(differences)
            return
        self.incompatible = None
        self.model = model
        LOG.info("executor %s is ready: model %r on %s", self.address, model.name, model.device)
        self._on_change()

    def _refuse(self, differences: list[str]) -> None:
        if self.incompatible is None:
            self.incompatible = IncompatibleError(
                f"the executor {self.address} would disagree with this service on: {', '.join(differences)}",
                stage="handshake",
                executor=self.address,
                differences=", ".join(differences),
            )
            LOG.error("%s", self.incompatible.message)
        self._on_change()

    async def _follow_load(self) -> None:
        request = executor_pb2.WatchLoadRequest()
        request.min_interval.FromMilliseconds(LOAD_INTERVAL_MS)
        async for load in self._stub.WatchLoad(request):
            was_ready, self._load = self.is_ready, load
            if was_ready != self.is_ready:
                self._on_change()

    def _disconnect(self, reason: str, is_first: bool) -> None:
        was_connected = self.model is not None
        self.model, self._load = None, None
        self._seen.clear()
        self._promised.clear()
        if was_connected:
            LOG.warning("lost executor %s: %s", self.address, reason)
            self._on_change()
        elif is_first and self.incompatible is None:
            LOG.info("waiting for executor %s: %s", self.address, reason)
