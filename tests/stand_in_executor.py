"""An executor without a model: speaks the contract, collects tensors, answers from a script.

For tests of what talks to executors. What the real one does is tested with the real one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from google.rpc import code_pb2, status_pb2

from diptych.service.lifecycle import GrpcFrame
from diptych.v1 import executor_pb2, tensor_pb2
from diptych.v1.executor_pb2_grpc import add_ExecutorServiceServicer_to_server
from diptych.wire.media import fingerprint_to_proto
from registry.fingerprint import Fingerprint

SERVICE_NAME = "diptych.v1.ExecutorService"
GIVEN_UP = status_pb2.Status(code=code_pb2.CANCELLED, message="cancelled")


@dataclass
class Live:
    """One request as the executor sees it."""

    start: executor_pb2.Start
    stream: int
    received: list[list[bytearray]]
    num_unacknowledged: int = 0
    held: frozenset[int] = frozenset()
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    stopped: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_complete(self) -> bool:
        return all(
            index in self.held or len(data) == tensor.chunks.total_bytes
            for index, (item, parts) in enumerate(zip(self.start.items, self.received, strict=True))
            for tensor, data in zip(item.tensors, parts, strict=True)
        )


class StandInExecutor:
    """Listens on a free port. Tests set the attributes and read what was recorded."""

    def __init__(self, fingerprint: Fingerprint, **limits: Any) -> None:
        self.fingerprint = fingerprint
        self.limits = {"max_model_len": 512, "max_items_per_prompt": {"image": 4}, "vocab_size": 600, **limits}
        self.script: Callable[[executor_pb2.Start], list[int]] = lambda start: list(start.prompt_token_ids)
        self.refusal: status_pb2.Status | None = None
        self.finish_reason = tensor_pb2.FINISH_REASON_LENGTH
        self.window = 1 << 20
        self.delay = 0.0
        self.held: set[bytes] = set()
        self.asks_one_by_one = False
        self.minds_stops = True
        self.has_room = asyncio.Event()
        self.has_room.set()
        self.accepting = True
        self.num_running = 0
        self.requests: list[Live] = []
        self.num_streams = 0
        self.order: list[tuple[str, int]] = []
        self.frame: GrpcFrame | None = None
        self.address = ""

    async def start(self, port: int = 0) -> None:
        self.frame = GrpcFrame("127.0.0.1", port, SERVICE_NAME)
        add_ExecutorServiceServicer_to_server(self, self.frame.server)
        self.address = await self.frame.start()
        await self.frame.set_serving(True)

    async def stop(self) -> None:
        assert self.frame is not None
        await self.frame.stop(0)

    # --- the contract -----------------------------------------------------------------------------

    async def GetModel(self, request: executor_pb2.GetModelRequest, context: Any) -> executor_pb2.GetModelResponse:  # noqa: N802
        return executor_pb2.GetModelResponse(
            name="stand-in",
            architecture="LlavaForConditionalGeneration",
            fingerprint=fingerprint_to_proto(self.fingerprint),
            limits=executor_pb2.Limits(**self.limits),
            device="none",
            dtype=tensor_pb2.D_TYPE_FLOAT32,
            memory_ledger=executor_pb2.MemoryLedger(num_blocks=7),
        )

    async def WatchLoad(  # noqa: N802
        self, request: executor_pb2.WatchLoadRequest, context: Any
    ) -> AsyncIterator[executor_pb2.WatchLoadResponse]:
        while True:
            yield executor_pb2.WatchLoadResponse(accepting=self.accepting, num_running=self.num_running)
            await asyncio.sleep(0.02)

    async def Execute(  # noqa: N802
        self, requests: AsyncIterator[executor_pb2.ExecuteRequest], context: Any
    ) -> AsyncIterator[executor_pb2.ExecuteResponse]:
        self.num_streams += 1
        responses: asyncio.Queue[executor_pb2.ExecuteResponse | None] = asyncio.Queue()
        reader = asyncio.create_task(self._read(requests, responses, self.num_streams))
        try:
            while (response := await responses.get()) is not None:
                yield response
        finally:
            reader.cancel()

    async def _read(self, requests: Any, responses: asyncio.Queue[Any], stream: int) -> None:
        live: dict[int, Live] = {}
        answers = set()
        async for request in requests:
            kind = request.WhichOneof("message")
            self.order.append((kind, request.handle))
            if kind == "start":
                assert request.handle not in live, "a handle is used twice"
                one = Live(request.start, stream, [[bytearray() for _ in item.tensors] for item in request.start.items])
                live[request.handle] = one
                self.requests.append(one)
                answers.add(asyncio.create_task(self._answer(request.handle, one, live, responses)))
            elif kind == "item_chunk":
                self._receive(request.handle, live.get(request.handle), request.item_chunk, responses)
            elif kind == "cancel" and request.handle in live:
                live[request.handle].cancelled.set()
            elif kind == "stop" and request.handle in live:
                live[request.handle].stopped.set()
        if answers:
            await asyncio.wait(answers)
        responses.put_nowait(None)

    def _receive(self, handle: int, one: Live | None, chunk: executor_pb2.ItemChunk, responses: Any) -> None:
        if one is None:
            return  # on its way when the request ended
        data = one.received[chunk.item_index][chunk.tensor_index]
        assert chunk.offset == len(data), "chunks of a tensor come in order"
        assert 1 <= len(chunk.data) <= 1 << 20
        one.num_unacknowledged += len(chunk.data)
        assert one.num_unacknowledged <= self.window, "more bytes than credit allows"
        data += chunk.data
        credit = executor_pb2.Credit(handle=handle, bytes=len(chunk.data))
        one.num_unacknowledged -= len(chunk.data)
        responses.put_nowait(executor_pb2.ExecuteResponse(credit=credit))

    async def _answer(self, handle: int, one: Live, live: dict[int, Live], responses: Any) -> None:
        final = executor_pb2.Final(handle=handle)
        if self.refusal is not None:
            final.status.CopyFrom(self.refusal)
        elif not await self._receive_items(handle, one, responses):
            final.status.CopyFrom(GIVEN_UP)
        else:
            await self._generate(handle, one, final, responses)
        del live[handle]
        responses.put_nowait(executor_pb2.ExecuteResponse(final=final))

    async def _receive_items(self, handle: int, one: Live, responses: Any) -> bool:
        if one.start.items:
            await self.has_room.wait()
            indices = [i for i, item in enumerate(one.start.items) if item.media_digest not in self.held]
            one.held = frozenset(range(len(one.start.items))) - set(indices)
            for some in [[index] for index in indices] if self.asks_one_by_one else [indices]:
                missing = executor_pb2.MissingItems(handle=handle, item_indices=some)
                responses.put_nowait(executor_pb2.ExecuteResponse(missing_items=missing))
            credit = executor_pb2.Credit(handle=handle, bytes=self.window)
            responses.put_nowait(executor_pb2.ExecuteResponse(credit=credit))
        while not one.is_complete:
            if one.cancelled.is_set():
                return False
            await asyncio.sleep(0.001)
        return True

    async def _generate(self, handle: int, one: Live, final: executor_pb2.Final, responses: Any) -> None:
        if one.start.sampling.HasField("prompt_logprobs"):
            for token_id in one.start.prompt_token_ids[1:]:
                chosen = tensor_pb2.TokenLogprob(token_id=token_id, logprob=-2.5)
                entry = tensor_pb2.PositionLogprobs(chosen=chosen, top=[chosen])
                message = executor_pb2.PromptLogprobs(handle=handle, logprobs=[entry])
                responses.put_nowait(executor_pb2.ExecuteResponse(prompt_logprobs=message))
        token_ids = self.script(one.start)[: one.start.sampling.max_tokens or None]
        num_sent = 0
        for token_id in token_ids:
            if one.cancelled.is_set():
                final.status.CopyFrom(GIVEN_UP)
                return
            if self.minds_stops and one.stopped.is_set():
                break
            num_sent += 1
            outputs = executor_pb2.StepOutputs(handles=[handle], token_ids=[token_id])
            if one.start.sampling.HasField("logprobs"):
                chosen = tensor_pb2.TokenLogprob(token_id=token_id, logprob=-1.5)
                entry = tensor_pb2.PositionLogprobs(chosen=chosen, top=[chosen])
                outputs.logprobs.append(executor_pb2.IndexedLogprobs(index=0, logprobs=entry))
            responses.put_nowait(executor_pb2.ExecuteResponse(step_outputs=outputs))
            await asyncio.sleep(self.delay)
        final.completion.finish_reason = self.finish_reason
        final.completion.usage.completion_tokens = num_sent
        final.completion.usage.cached_tokens = 1
        final.completion.usage.prompt_tokens = len(one.start.prompt_token_ids)
        final.completion.times.prefill_seconds = 0.25


async def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Returns once the condition holds; AssertionError if it does not within `seconds`."""
    for _ in range(int(seconds / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never happened")
