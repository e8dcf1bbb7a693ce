"""The asynchronous client: the same methods as the synchronous one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from diptych.client.channel import CHANNEL_OPTIONS
from diptych.client.errors import from_rpc_error
from diptych.client.inputs import Chat, GenerateOptions, Prompt, generate_request, plan_request, process_request
from diptych.client.results import (
    ExecutorModel,
    Generation,
    Model,
    Piece,
    Plan,
    Processed,
    executor_model_from_proto,
    models_from_proto,
    piece_from_proto,
    plan_from_proto,
)
from diptych.v1 import executor_pb2, preprocess_pb2
from diptych.v1.executor_pb2_grpc import ExecutorServiceStub
from diptych.v1.preprocess_pb2_grpc import PreprocessServiceStub


class AsyncClient:
    """Talks to one address; `timeout` in seconds is the default deadline of every call. Errors are RequestError."""

    def __init__(self, address: str, timeout: float | None = None) -> None:
        self._channel: Any = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub: Any = PreprocessServiceStub(self._channel)
        self._executor: Any = ExecutorServiceStub(self._channel)
        self._timeout = timeout

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection."""
        await self._channel.close()

    async def stream(
        self,
        prompt: Prompt | Chat,
        *,
        timeout: float | None = None,  # noqa: ASYNC109  # the deadline that travels with the call
        **options: Unpack[GenerateOptions],
    ) -> AsyncIterator[Piece]:
        """The answer piece by piece; closing the iterator cancels the request."""
        call = self._stub.Generate(
            generate_request(prompt, options), timeout=self._timeout if timeout is None else timeout
        )
        try:
            async for message in call:
                yield piece_from_proto(message)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        finally:
            call.cancel()

    async def generate(
        self,
        prompt: Prompt | Chat,
        *,
        timeout: float | None = None,  # noqa: ASYNC109  # the deadline that travels with the call
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """The whole answer; the first, where several are asked for."""
        return (await self.generate_all(prompt, timeout=timeout, **options))[0]

    async def generate_all(
        self,
        prompt: Prompt | Chat,
        *,
        timeout: float | None = None,  # noqa: ASYNC109  # the deadline that travels with the call
        **options: Unpack[GenerateOptions],
    ) -> list[Generation]:
        """All `n` answers whole."""
        generations: defaultdict[int, Generation] = defaultdict(Generation)
        async for piece in self.stream(prompt, timeout=timeout, **options):
            generations[piece.index].add(piece)
        return [generations[index] for index in sorted(generations)]

    async def process(self, prompt: Prompt | Chat, *, model: str | None = None) -> Processed:
        """Plan and tensors, for a consumer of one's own."""
        processed, call = Processed(), self._stub.Process(process_request(prompt, model), timeout=self._timeout)
        try:
            async for message in call:
                processed.add(message)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        return processed

    async def plan(self, prompt: Prompt | Chat, *, model: str | None = None) -> Plan:
        """Token ids, placeholder ranges and tensor shapes; nothing is decoded."""
        return plan_from_proto(await self._call(self._stub.Plan, plan_request(prompt, model)))

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        request = preprocess_pb2.TokenizeRequest(text=text, add_special_tokens=add_special_tokens)
        return list((await self._call(self._stub.Tokenize, request)).token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        request = preprocess_pb2.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        text: str = (await self._call(self._stub.Detokenize, request)).text
        return text

    async def list_models(self) -> list[Model]:
        """The models the service serves."""
        return models_from_proto(await self._call(self._stub.ListModels, preprocess_pb2.ListModelsRequest()))

    async def get_model(self) -> ExecutorModel:
        """What an executor (not a preprocess service) serves."""
        return executor_model_from_proto(await self._call(self._executor.GetModel, executor_pb2.GetModelRequest()))

    async def health(self, service: str = "") -> str:
        """`"SERVING"`, `"NOT_SERVING"`, …; "" asks for the process, a name for that service."""
        check = health_pb2_grpc.HealthStub(self._channel).Check
        response = await self._call(check, health_pb2.HealthCheckRequest(service=service))
        name: str = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
        return name

    async def _call(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, timeout=self._timeout)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
