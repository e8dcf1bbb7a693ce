"""A hand-driven peer of the executor: sends exactly what a test says, and collects what comes back."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from google.rpc import error_details_pb2

from diptych.v1 import executor_pb2, executor_pb2_grpc, tensor_pb2
from diptych.wire.dtypes import DTYPE_OF_NAME
from diptych.wire.framing import ItemChunk, encode_request, split_tensor
from diptych.wire.media import media_info_to_proto, placeholder_to_proto
from registry import MediaInfo, MediaItem, ProcessorInputs
from registry.family import ModelFamily
from registry.fingerprint import fixed_picture


@dataclass
class Planned:
    """A request as an honest sender would make it; tests then spoil it."""

    start: executor_pb2.Start
    tensors: list[np.ndarray]


@dataclass
class Answer:
    """Everything one handle got."""

    tokens: list[int] = field(default_factory=list)
    credit: int = 0
    missing: list[int] | None = None
    finals: list[executor_pb2.Final] = field(default_factory=list)

    @property
    def status(self) -> Any:
        assert len(self.finals) == 1
        assert self.finals[0].WhichOneof("outcome") == "status", self.finals[0]
        return self.finals[0].status

    @property
    def code(self) -> grpc.StatusCode:
        return next(code for code in grpc.StatusCode if code.value[0] == self.status.code)

    @property
    def facts(self) -> dict[str, str]:
        info = error_details_pb2.ErrorInfo()
        assert self.status.details[0].Unpack(info)
        return dict(info.metadata)


class Planner:
    """Makes honest requests for one served model."""

    def __init__(self, family: ModelFamily, fingerprint: bytes) -> None:
        self.family, self.fingerprint = family, fingerprint

    def plan(self, text: str = "Look: <image> so?", sizes: tuple[tuple[int, int], ...] = ((60, 80),), **sampling: Any):
        pictures = [MediaItem(MediaInfo.image(*size), fixed_picture(*size)) for size in sizes]
        return self.plan_items(text, pictures, **sampling)

    def plan_items(self, text: str, media: list[MediaItem], **sampling: Any) -> Planned:
        """Every item has one tensor."""
        ids = self.family.ctx.tokenizer(text)["input_ids"]
        inputs = self.family.process(ProcessorInputs(ids, [item.info for item in media]))
        mapped = [next(iter(self.family.map_item(item).items())) for item in media]
        items = [
            executor_pb2.MediaItem(
                info=media_info_to_proto(item.info), placeholder=placeholder_to_proto(place), tensors=[describe(*named)]
            )
            for item, place, named in zip(media, inputs.placeholders, mapped, strict=True)
        ]
        params = tensor_pb2.SamplingParams(**{"max_tokens": 8, "temperature": 0, "ignore_eos": True, **sampling})
        start = executor_pb2.Start(
            request_id="test", fingerprint=self.fingerprint, prompt_token_ids=inputs.prompt_token_ids,
            items=items, sampling=params,
        )  # fmt: skip
        return Planned(start, [tensor for _, tensor in mapped])


def describe(name: str, tensor: np.ndarray) -> tensor_pb2.Tensor:
    payload = tensor_pb2.ChunkedPayload(total_bytes=tensor.nbytes)
    return tensor_pb2.Tensor(name=name, dtype=DTYPE_OF_NAME[tensor.dtype.name], shape=tensor.shape, chunks=payload)


class Peer:
    """One `Execute` stream; `packed` are the handles of each message with tokens."""

    def __init__(self, channel: grpc.Channel, timeout: float = 60) -> None:
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        method = channel.stream_stream(
            "/diptych.v1.ExecutorService/Execute",
            request_serializer=encode_request,
            response_deserializer=executor_pb2.ExecuteResponse.FromString,
        )
        # A deadline of the whole stream, so that an answer that never comes fails the test instead of hanging it.
        self.call = method(self._requests(), timeout=timeout)
        self.answers: dict[int, Answer] = {}
        self.packed: list[list[int]] = []

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._outbox.put(None)
        self.call.cancel()

    def _requests(self) -> Iterator[Any]:
        while (request := self._outbox.get()) is not None:
            yield request

    def send(self, request: Any) -> None:
        self._outbox.put(request)

    def half_close(self) -> None:
        self._outbox.put(None)

    def start(self, handle: int, planned: Planned) -> None:
        self.send(executor_pb2.ExecuteRequest(handle=handle, start=planned.start))

    def cancel(self, handle: int) -> None:
        self.send(executor_pb2.ExecuteRequest(handle=handle, cancel=executor_pb2.Cancel()))

    def stop(self, handle: int) -> None:
        self.send(executor_pb2.ExecuteRequest(handle=handle, stop=executor_pb2.Stop()))

    def send_tensors(self, handle: int, planned: Planned) -> None:
        for index, tensor in enumerate(planned.tensors):
            for chunk in split_tensor(handle, index, 0, memoryview(tensor).cast("B")):
                self.send(chunk)

    def send_chunk(self, handle: int, item: int, tensor: int, offset: int, data: bytes) -> None:
        self.send(ItemChunk(handle, item, tensor, offset, memoryview(data)))

    def read(self) -> None:
        """Take one message."""
        response = next(self.call)
        match response.WhichOneof("message"):
            case "missing_items":
                self._answer(response.missing_items.handle).missing = list(response.missing_items.item_indices)
            case "credit":
                self._answer(response.credit.handle).credit += response.credit.bytes
            case "step_outputs":
                outputs = response.step_outputs
                self.packed.append(list(outputs.handles))
                for handle, token in zip(outputs.handles, outputs.token_ids, strict=True):
                    assert not self._answer(handle).finals, "a token after the Final"
                    self._answer(handle).tokens.append(token)
            case "final":
                self._answer(response.final.handle).finals.append(response.final)

    def wait_credit(self, handle: int) -> Answer:
        while not self._answer(handle).credit and not self._answer(handle).finals:
            self.read()
        return self._answer(handle)

    def finish(self, handle: int) -> Answer:
        while not self._answer(handle).finals:
            self.read()
        return self._answer(handle)

    def run(self, handle: int, planned: Planned) -> Answer:
        """The whole honest exchange."""
        self.begin(handle, planned)
        return self.finish(handle)

    def begin(self, handle: int, planned: Planned) -> None:
        """All that an honest sender says."""
        self.start(handle, planned)
        if planned.tensors:
            self.wait_credit(handle)
            self.send_tensors(handle, planned)

    def begin_generating(self, handle: int, planned: Planned) -> None:
        """Until the first token has come."""
        self.begin(handle, planned)
        while not self._answer(handle).tokens:
            self.read()

    def _answer(self, handle: int) -> Answer:
        return self.answers.setdefault(handle, Answer())


def model_facts(channel: grpc.Channel) -> executor_pb2.GetModelResponse:
    return executor_pb2_grpc.ExecutorServiceStub(channel).GetModel(executor_pb2.GetModelRequest())
