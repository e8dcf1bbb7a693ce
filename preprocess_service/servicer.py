"""`PreprocessService`: between the contract's messages and the pipeline's dataclasses, and nothing else."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing
from typing import Any, Final

from diptych.service.errors import InvalidInputError, LimitExceededError, NotFoundError
from diptych.v1 import preprocess_pb2
from diptych.wire.dtypes import DTYPE_OF_NAME
from diptych.wire.media import media_info_to_proto, placeholder_to_proto
from preprocess_service.executor_client import ExecutorPool
from preprocess_service.limits import (
    MAX_BAD_WORD_LENGTH,
    MAX_BAD_WORDS,
    MAX_DETOKENIZED,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    check_count,
    check_texts,
)
from preprocess_service.pipeline import Pipeline
from preprocess_service.planning import Checkpoint
from preprocess_service.reading import read_input
from preprocess_service.requests import (
    Chat,
    Deadline,
    Delta,
    Ended,
    GenerateCall,
    Plan,
    PlannedItem,
    Prompt,
    TensorPiece,
)

MAX_ANSWERS: Final = 128


class PreprocessServicer:
    """The six methods of the contract."""

    def __init__(self, model_name: str, checkpoint: Checkpoint, pipeline: Pipeline, executors: ExecutorPool) -> None:
        self._model_name = model_name
        self._checkpoint = checkpoint
        self._pipeline = pipeline
        self._executors = executors

    async def Generate(  # noqa: N802
        self, request: preprocess_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[preprocess_pb2.GenerateResponse]:
        """Stream the answer."""
        self._check_model(request)
        check_texts("stop", "stop string", request.stop, MAX_STOP_STRINGS, MAX_STOP_LENGTH)
        check_texts("bad_words", "bad word", request.bad_words, MAX_BAD_WORDS, MAX_BAD_WORD_LENGTH)
        call = GenerateCall(
            input=self._read_input(request),
            request_id=request.request_id or secrets.token_hex(8),
            sampling=request.sampling,
            stop=tuple(request.stop),
            bad_words=tuple(request.bad_words),
            deadline=Deadline.after(context.time_remaining()),
            traceparent=_traceparent(context),
            priority=request.priority if request.HasField("priority") else None,
            num_answers=_check_n(request.n) if request.HasField("n") else 1,
        )
        async with aclosing(self._pipeline.generate(call)) as pieces:
            async for piece in pieces:
                yield generate_response(piece)

    async def Plan(self, request: preprocess_pb2.PlanRequest, context: Any) -> preprocess_pb2.PlanResponse:  # noqa: N802
        """Plan from headers."""
        self._check_model(request)
        deadline = Deadline.after(context.time_remaining())
        return plan_response(await self._pipeline.plan(self._read_input(request), deadline))

    async def Process(  # noqa: N802
        self, request: preprocess_pb2.ProcessRequest, context: Any
    ) -> AsyncIterator[preprocess_pb2.ProcessResponse]:
        """Stream the plan and the tensors."""
        self._check_model(request)
        deadline = Deadline.after(context.time_remaining())
        async with aclosing(self._pipeline.process(self._read_input(request), deadline)) as pieces:
            async for piece in pieces:
                yield process_response(piece)

    async def Tokenize(  # noqa: N802
        self, request: preprocess_pb2.TokenizeRequest, context: Any
    ) -> preprocess_pb2.TokenizeResponse:
        """Token ids of a text."""
        self._check_model(request)
        adds = request.add_special_tokens if request.HasField("add_special_tokens") else True
        return preprocess_pb2.TokenizeResponse(token_ids=await self._pipeline.tokenize(request.text, adds))

    async def Detokenize(  # noqa: N802
        self, request: preprocess_pb2.DetokenizeRequest, context: Any
    ) -> preprocess_pb2.DetokenizeResponse:
        """The text of token ids."""
        self._check_model(request)
        check_count("token_ids has {} ids", len(request.token_ids), MAX_DETOKENIZED)
        vocab_size = self._checkpoint.family.ctx.vocab_size
        if (largest := max(request.token_ids, default=0)) >= vocab_size:
            raise InvalidInputError(
                f"token id {largest} does not exist; ids are below {vocab_size}",
                stage="admit",
                limit=vocab_size - 1,
                actual=largest,
            )
        skips = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        text = await self._pipeline.detokenize(list(request.token_ids), skips)
        return preprocess_pb2.DetokenizeResponse(text=text)

    async def ListModels(  # noqa: N802
        self, request: preprocess_pb2.ListModelsRequest, context: Any
    ) -> preprocess_pb2.ListModelsResponse:
        """The one model."""
        limits, theirs = self._executors.limits, self._executors.model
        counts = {modality: limits.media.max_items(modality) for modality in self._checkpoint.family.modalities}
        model = preprocess_pb2.Model(
            name=self._model_name,
            architecture=self._checkpoint.family.ctx.architecture,
            placeholders=self._checkpoint.family.placeholder_texts,
            max_model_len=limits.max_model_len or 0,
            max_items_per_prompt=counts,
            max_tokens_per_item=dict(theirs.limits.max_tokens_per_item) if theirs is not None else {},
            fingerprint=self._checkpoint.fingerprint.digest,
            num_ready_executors=len(self._executors.ready),
        )
        return preprocess_pb2.ListModelsResponse(models=[model])

    def _read_input(self, request: Any) -> Prompt | Chat:
        return read_input(request, self._executors.limits.max_items(self._checkpoint.family.modalities))

    def _check_model(self, request: Any) -> None:
        if request.HasField("model") and request.model != self._model_name:
            raise NotFoundError(
                f"model {request.model!r} is not served here; this service serves {self._model_name!r}",
                stage="admit",
                model=request.model,
            )


def _check_n(n: int) -> int:
    if not 1 <= n <= MAX_ANSWERS:
        raise LimitExceededError(
            f"n is {n}; it must be at least 1 and at most {MAX_ANSWERS}",
            stage="admit",
            limit=MAX_ANSWERS if n else 1,
            actual=n,
            field="n",
        )
    return n


def generate_response(piece: Delta | Ended) -> preprocess_pb2.GenerateResponse:
    """A piece of an answer as a message."""
    if isinstance(piece, Delta):
        return preprocess_pb2.GenerateResponse(
            index=piece.index,
            text=piece.text,
            token_ids=piece.token_ids,
            logprobs=piece.logprobs,
            prompt_logprobs=piece.prompt_logprobs,
        )
    final = preprocess_pb2.GenerateFinal(
        finish_reason=piece.finish_reason, usage=piece.usage, times=piece.times, stop=piece.stop
    )
    return preprocess_pb2.GenerateResponse(index=piece.index, text=piece.text, final=final)


def process_response(piece: Plan | TensorPiece) -> preprocess_pb2.ProcessResponse:
    """The plan, or bytes of a tensor, as a message."""
    if isinstance(piece, Plan):
        return preprocess_pb2.ProcessResponse(plan=plan_response(piece))
    chunk = preprocess_pb2.ProcessedChunk(
        item_index=piece.item_index, tensor_index=piece.tensor_index, offset=piece.offset, data=bytes(piece.data)
    )
    return preprocess_pb2.ProcessResponse(chunk=chunk)


def plan_response(plan: Plan) -> preprocess_pb2.PlanResponse:
    """A plan as a message."""
    return preprocess_pb2.PlanResponse(
        prompt_token_ids=plan.prompt_token_ids, items=[_planned_item(item) for item in plan.items]
    )


def _planned_item(item: PlannedItem) -> preprocess_pb2.PlannedItem:
    return preprocess_pb2.PlannedItem(
        info=media_info_to_proto(item.info),
        media_digest=item.media_digest,
        placeholder=placeholder_to_proto(item.placeholder),
        num_feature_tokens=item.num_feature_tokens,
        tensors=[
            preprocess_pb2.TensorShape(name=name, dtype=DTYPE_OF_NAME[spec.dtype], shape=spec.shape)
            for name, spec in item.tensors.items()
        ],
    )


def _traceparent(context: Any) -> str | None:
    metadata: Iterable[tuple[str, str | bytes]] = context.invocation_metadata() or ()
    return next((str(value) for name, value in metadata if name == "traceparent"), None)
