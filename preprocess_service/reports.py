"""What this service reports of its requests: the attributes of their traces, and its metrics."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

from diptych.service.telemetry import Telemetry, annotate
from diptych.service.telemetry import metrics as catalogue
from diptych.service.telemetry.tracing import AttributeValue, code_of
from diptych.v1 import tensor_pb2
from preprocess_service.executor_client import ExecutorPool
from preprocess_service.pipeline import Pipeline
from preprocess_service.requests import Chat, Delta, Ended, GenerateCall, Media, MediaHeader

PROVIDER: Final = "diptych"
_MAX_INT64: Final = 2**63 - 1
_SAMPLING: Final = ("max_tokens", "temperature", "top_p", "top_k", "seed", "presence_penalty", "frequency_penalty")
"""Fields of SamplingParams that the semantic conventions know."""


class PreprocessReports:
    """Totals that are read when somebody looks, and histograms that are recorded as things happen."""

    def __init__(self, telemetry: Telemetry, model_name: str, pipeline: Pipeline, executors: ExecutorPool) -> None:
        self._model_name = model_name
        self.num_media_bytes = 0
        self.num_output_tokens = 0
        self.first_token = telemetry.histogram(catalogue.TIME_TO_FIRST_TOKEN)
        self.between_tokens = telemetry.histogram(catalogue.INTER_TOKEN_LATENCY)
        self.duration = telemetry.histogram(catalogue.REQUEST_DURATION)
        telemetry.observe(catalogue.PROMPT_TOKENS, lambda: [(pipeline.num_prompt_tokens, {})])
        telemetry.observe(catalogue.OUTPUT_TOKENS, lambda: [(self.num_output_tokens, {})])
        telemetry.observe(catalogue.PENDING, lambda: [(pipeline.num_pending, {})])
        telemetry.observe(catalogue.READY_EXECUTORS, lambda: [(len(executors.ready), {})])
        telemetry.observe(
            catalogue.PAYLOAD,
            lambda: [
                (self.num_media_bytes, {"kind": "media"}),
                (executors.num_sent_bytes, {"kind": "tensors_sent"}),
            ],
        )

    def answer(self, call: GenerateCall) -> AnswerReport:
        """The report of one request, for as long as its block lasts."""
        self.num_media_bytes += sum(map(_num_bytes, call.input.media))
        operation = "chat" if isinstance(call.input, Chat) else "text_completion"
        labels = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": self._model_name,
        }
        return AnswerReport(self, call, labels)


class AnswerReport:
    """One request. `note` is called for every piece of the answer, so it does little."""

    __slots__ = ("_began", "_call", "_ended", "_labels", "_last", "_reports")

    def __init__(self, reports: PreprocessReports, call: GenerateCall, labels: dict[str, str]) -> None:
        self._reports = reports
        self._call = call
        self._labels = labels
        self._began = time.perf_counter()
        self._last: dict[int, float] = {}
        self._ended: list[Ended] = []

    def __enter__(self) -> Self:
        annotate(lambda: {**self._labels, **_request_attributes(self._call)})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        outcome = {"error.type": "" if error is None else code_of(error)}
        self._reports.duration.record(time.perf_counter() - self._began, {**self._labels, **outcome})
        if self._ended:
            annotate(lambda: _response_attributes(self._ended))

    def note(self, piece: Delta | Ended) -> None:
        """A piece is about to be sent."""
        if isinstance(piece, Ended):
            self._ended.append(piece)
            return
        if not piece.token_ids:
            return
        now = time.perf_counter()
        if (last := self._last.get(piece.index)) is not None:
            self._reports.between_tokens.record(now - last)
        elif not self._last:
            self._reports.first_token.record(now - self._began, self._labels)
        self._last[piece.index] = now
        self._reports.num_output_tokens += len(piece.token_ids)


def _request_attributes(call: GenerateCall) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {
        "diptych.request_id": call.request_id,
        "diptych.media_items": len(call.input.media),
    }
    for name in _SAMPLING:
        if call.sampling.HasField(name):
            attributes[f"gen_ai.request.{name}"] = _exportable(getattr(call.sampling, name))
    return attributes


def _exportable(value: float) -> AttributeValue:
    """OTLP has signed integers only, and one that does not fit would lose the whole batch of spans."""
    return value if value <= _MAX_INT64 else str(value)


def _response_attributes(answers: Sequence[Ended]) -> dict[str, AttributeValue | list[str]]:
    """Of all answers, which share their prompt."""
    reasons = [tensor_pb2.FinishReason.Name(ended.finish_reason) for ended in answers]
    usage = answers[0].usage
    return {
        "gen_ai.response.finish_reasons": [name.removeprefix("FINISH_REASON_").lower() for name in reasons],
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": sum(ended.usage.completion_tokens for ended in answers),
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
        "diptych.usage.image_tokens": usage.image_tokens,
    }


def _num_bytes(media: Media) -> int:
    return len(media.source.prefix) if isinstance(media.source, MediaHeader) else len(media.source)
