"""Output tokens to an answer: text in whole characters, stop strings, usage, times."""

from __future__ import annotations

from collections.abc import Sequence

from diptych.v1 import executor_pb2, tensor_pb2
from preprocess_service.requests import Delta, Ended, MappedItem, Plan
from preprocess_service.tokens import IncrementalDetokenizer, StopStrings, TextTokenizer


class Answer:
    """One answer in the making; stop strings that are complete within the first `min_tokens` tokens do not count."""

    def __init__(self, tokenizer: TextTokenizer, stops: Sequence[str], plan: Plan, min_tokens: int = 0) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._stops = StopStrings(stops)
        self._plan = plan
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self.decode_seconds: float | None = None
        self.map_seconds: float | None = None

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string is complete: tokens from here on do not exist for the client."""
        return self._stops.matched is not None

    def add(self, token_id: int, logprobs: tensor_pb2.PositionLogprobs | None, delta: Delta) -> None:
        """Put one more token, and the text that it settles, into `delta`."""
        self._num_tokens += 1
        delta.token_ids.append(token_id)
        if logprobs is not None:
            delta.logprobs.append(logprobs)
        delta.text += self._feed(self._detokenizer.step(token_id))

    def add_times(self, mapped: MappedItem) -> None:
        """Count one item's work; items are worked on in parallel, so the sums may exceed the clock."""
        self.decode_seconds = (self.decode_seconds or 0.0) + mapped.decode_seconds
        self.map_seconds = (self.map_seconds or 0.0) + mapped.map_seconds

    def complete(self, completion: executor_pb2.Completion) -> Ended:
        """The end as the executor saw it, with the text that was held back."""
        text = "" if self.is_stopped else self._feed(self._detokenizer.finish())
        if self.is_stopped:
            return self._stopped(text, completion.usage, completion.times)
        return Ended(
            text + self._stops.finish(), completion.finish_reason, completion.usage, self._times(completion.times)
        )

    def _feed(self, text: str) -> str:
        return self._stops.feed(text) if self._num_tokens > self._min_tokens else self._stops.skip(text)

    def stopped(self, completion: executor_pb2.Completion | None) -> Ended:
        """The end at a stop string; None: the executor had nothing to say of it, and only what we know is told."""
        if completion is not None:
            return self._stopped("", completion.usage, completion.times)
        usage = tensor_pb2.Usage(
            prompt_tokens=len(self._plan.prompt_token_ids), image_tokens=self._plan.num_feature_tokens
        )
        return self._stopped("", usage, tensor_pb2.StageTimes())

    def _stopped(self, text: str, usage: tensor_pb2.Usage, times: tensor_pb2.StageTimes) -> Ended:
        counted = tensor_pb2.Usage()
        counted.CopyFrom(usage)
        counted.completion_tokens = self._num_tokens
        reason = tensor_pb2.FINISH_REASON_STOP
        return Ended(text, reason, counted, self._times(times), stop=self._stops.matched)

    def _times(self, executor: tensor_pb2.StageTimes) -> tensor_pb2.StageTimes:
        """The executor's times and ours."""
        ours = tensor_pb2.StageTimes(plan_seconds=self._plan.seconds)
        if self.decode_seconds is not None and self.map_seconds is not None:
            ours.decode_media_seconds, ours.map_seconds = self.decode_seconds, self.map_seconds
        times = tensor_pb2.StageTimes()
        times.CopyFrom(executor)
        times.MergeFrom(ours)
        return times
