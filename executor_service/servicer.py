"""The contract's executor service: messages to the front and back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

import grpc

from diptych.service.errors import InvalidInputError
from diptych.service.lifecycle import MAX_MESSAGE_BYTES
from diptych.v1 import executor_pb2, executor_pb2_grpc
from diptych.wire.dtypes import DTYPE_OF_NAME, MODALITY_OF_NAME
from diptych.wire.framing import ItemChunk, decode_request
from diptych.wire.media import fingerprint_to_proto
from executor_service.front.front import Front
from executor_service.front.stream import ExecuteStream

SERVICE_NAME: Final = executor_pb2.DESCRIPTOR.services_by_name["ExecutorService"].full_name
DEFAULT_INTERVAL: Final = 1.0
MIN_INTERVAL: Final = 0.01


class ExecutorServicer(executor_pb2_grpc.ExecutorServiceServicer):
    """Proto to dataclass and back; everything else is the front's."""

    def __init__(self, front: Front, model_name: str) -> None:
        self._front = front
        self._model_name = model_name

    async def Execute(  # noqa: N802 - the contract's name
        self,
        request_iterator: AsyncIterator[executor_pb2.ExecuteRequest | ItemChunk],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[executor_pb2.ExecuteResponse]:
        """One stream with one request or many; see the contract."""
        stream = ExecuteStream(self._front, _peer_identity(context))
        reader = asyncio.create_task(_read(stream, request_iterator))
        try:
            async for response in stream.responses():
                yield response
        finally:
            reader.cancel()
            stream.lose()

    async def GetModel(  # noqa: N802
        self, request: executor_pb2.GetModelRequest, context: grpc.aio.ServicerContext
    ) -> executor_pb2.GetModelResponse:
        """Limits, fingerprint, normalisation, memory ledger."""
        booted = self._front.booted
        return executor_pb2.GetModelResponse(
            name=self._model_name,
            architecture=booted.architecture,
            fingerprint=fingerprint_to_proto(booted.fingerprint),
            limits=self._limits(),
            normalizations=self._normalizations(),
            memory_ledger=executor_pb2.MemoryLedger(**vars(booted.ledger)),
            device=booted.device,
            dtype=DTYPE_OF_NAME[booted.dtype],
        )

    async def WatchLoad(  # noqa: N802
        self, request: executor_pb2.WatchLoadRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[executor_pb2.WatchLoadResponse]:
        """The load now, and whenever it has changed."""
        interval = _interval(request)
        previous = None
        while True:
            current = self._load()
            if current != previous:
                yield current
                previous = current
            await asyncio.sleep(interval)

    def _limits(self) -> executor_pb2.Limits:
        booted, media = self._front.booted, self._front.family.ctx.limits
        return executor_pb2.Limits(
            max_model_len=booted.max_model_len,
            max_num_seqs=booted.max_num_seqs,
            max_num_batched_tokens=booted.max_num_batched_tokens,
            max_items_per_prompt={name: media.max_items(name) for name in self._front.family.modalities},
            max_tokens_per_item=booted.max_tokens_per_item,
            vocab_size=booted.vocab_size,
            max_receive_bytes=MAX_MESSAGE_BYTES,
            max_image_side=media.max_image_side,
            max_image_pixels=media.max_image_pixels,
        )

    def _normalizations(self) -> list[executor_pb2.Normalization]:
        family = self._front.family
        found = []
        for modality in family.modalities:
            if not family.has_layout(modality):
                continue
            layout = family.layout(family.find_largest(modality, "num_bytes"))
            for name, spec in layout.tensors.items():
                if (normalization := spec.normalization) is not None:
                    found.append(
                        executor_pb2.Normalization(
                            modality=MODALITY_OF_NAME[modality],
                            tensor_name=name,
                            rescale_factor=normalization.rescale_factor,
                            mean=normalization.mean,
                            std=normalization.std,
                            channel_axis=normalization.channel_axis,
                        )
                    )
        return found

    def _load(self) -> executor_pb2.WatchLoadResponse:
        load = self._front.load
        return executor_pb2.WatchLoadResponse(
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_receiving=self._front.num_receiving,
            num_used_blocks=load.num_used_blocks,
            num_blocks=load.num_blocks,
            accepting=self._front.is_accepting,
            num_preemptions=load.num_preemptions,
        )


def _peer_identity(context: grpc.aio.ServicerContext) -> str:
    """Who the peer has proved to be by its certificate; empty without TLS: then all peers are one."""
    identities = context.peer_identities()
    return repr(sorted(identities)) if identities else ""


async def _read(stream: ExecuteStream, requests: AsyncIterator[executor_pb2.ExecuteRequest | ItemChunk]) -> None:
    """Until the sender half-closes; a failure here ends the call, which would wait for messages for ever."""
    try:
        async for request in requests:
            stream.handle(request)
            await stream.wait_for_room()
    except Exception as error:
        stream.fail(error)
    else:
        stream.half_close()


def _interval(request: executor_pb2.WatchLoadRequest) -> float:
    if not request.HasField("min_interval"):
        return DEFAULT_INTERVAL
    seconds = request.min_interval.ToNanoseconds() / 1e9
    if seconds < MIN_INTERVAL:
        raise InvalidInputError(
            f"min_interval is {seconds:g} s; it must be at least {MIN_INTERVAL:g} s",
            stage="admit",
            limit=MIN_INTERVAL,
            actual=seconds,
        )
    return seconds


def add_to_server(servicer: ExecutorServicer, server: grpc.aio.Server) -> None:
    """Register the service; `Execute` reads chunks without copying them, the rest is generated code."""
    handlers = {
        "Execute": grpc.stream_stream_rpc_method_handler(
            servicer.Execute,
            request_deserializer=decode_request,
            response_serializer=executor_pb2.ExecuteResponse.SerializeToString,
        ),
        "GetModel": grpc.unary_unary_rpc_method_handler(
            servicer.GetModel,
            request_deserializer=executor_pb2.GetModelRequest.FromString,
            response_serializer=executor_pb2.GetModelResponse.SerializeToString,
        ),
        "WatchLoad": grpc.unary_stream_rpc_method_handler(
            servicer.WatchLoad,
            request_deserializer=executor_pb2.WatchLoadRequest.FromString,
            response_serializer=executor_pb2.WatchLoadResponse.SerializeToString,
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))
