"""Admission: everything a Start claims is checked against the family before anything is allocated.

Attestation recomputes each item's layout from its header facts: the range, its tokens and every tensor's
name, dtype and shape must be what the layout says.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diptych.service.errors import (
    IncompatibleError,
    InvalidInputError,
    LimitExceededError,
    UnimplementedError,
)
from diptych.service.media_errors import from_media_error
from diptych.service.sampling import check_sampling
from diptych.v1 import executor_pb2, tensor_pb2
from diptych.wire.media import media_info_from_proto
from executor_service.engine.messages import Booted, SamplingParams
from executor_service.front.claims import STAGE, attest_tensors, bound_tensors
from registry import ItemLayout, MediaInfo, PlaceholderRange, TensorSpec
from registry.errors import MediaError, RegistryError
from registry.family import ModelFamily


@dataclass(frozen=True)
class AdmittedItem:
    """An item whose claims hold; `tensors` in the order of the Start."""

    info: MediaInfo
    placeholder: PlaceholderRange
    layout: ItemLayout
    tensors: tuple[tuple[str, TensorSpec], ...]


@dataclass(frozen=True)
class AdmittedRequest:
    """A Start whose claims hold."""

    request_id: str
    prompt_token_ids: list[int]
    items: tuple[AdmittedItem, ...]
    sampling: SamplingParams
    time_left: float | None
    traceparent: str

    @property
    def num_image_tokens(self) -> int:
        """Feature tokens of all items."""
        return sum(item.layout.num_tokens for item in self.items)


class Admission:
    """Checks Starts against one model."""

    def __init__(self, family: ModelFamily, booted: Booted) -> None:
        self._family = family
        self._booted = booted
        self._feature_ids = np.array(sorted(family.feature_token_ids), dtype=np.int64)

    def admit(self, start: executor_pb2.Start) -> AdmittedRequest:
        """The request, or the DiptychError it is refused with."""
        self._check_fingerprint(start.fingerprint)
        _check_served_fields(start)
        token_ids = np.fromiter(start.prompt_token_ids, dtype=np.int64, count=len(start.prompt_token_ids))
        self._check_length(len(token_ids))
        items = self._attest_items(start.items, token_ids)
        self._check_token_ids(token_ids, items)
        return AdmittedRequest(
            request_id=start.request_id,
            prompt_token_ids=token_ids.tolist(),
            items=tuple(items),
            sampling=self._sampling(start.sampling, len(token_ids)),
            traceparent=start.traceparent,
            time_left=start.time_left.ToNanoseconds() / 1e9 if start.HasField("time_left") else None,
        )

    def _check_fingerprint(self, digest: bytes) -> None:
        if digest != self._booted.fingerprint.digest:
            raise IncompatibleError(
                f"the sender's fingerprint is {digest.hex() or 'empty'}, this executor's is "
                f"{self._booted.fingerprint.digest.hex()}: they would disagree on tokens, pixels or shapes",
                stage="handshake",
            )

    def _check_length(self, length: int) -> None:
        most = self._booted.max_model_len - 1
        if length < 1:
            raise InvalidInputError("the prompt has no tokens", stage="admit", limit=1, actual=0)
        if length > most:
            raise LimitExceededError(
                f"the prompt has {length} tokens; at most {most} are allowed (max_model_len "
                f"{self._booted.max_model_len} less one output token)",
                stage="admit",
                limit=most,
                actual=length,
            )

    def _attest_items(self, messages: Sequence[executor_pb2.MediaItem], token_ids: np.ndarray) -> list[AdmittedItem]:
        items: list[AdmittedItem] = []
        end = 0
        index: int | None = None
        try:
            for index, message in enumerate(messages):
                items.append(self._attest_item(index, message, token_ids, end))
                end = items[-1].placeholder.end
            index = None
            self._family.ctx.limits.check_counts(Counter(item.info.modality for item in items))
        except MediaError as error:
            error.item_index = index
            raise from_media_error(error, STAGE) from error
        return items

    def _attest_item(
        self, index: int, message: executor_pb2.MediaItem, token_ids: np.ndarray, earliest: int
    ) -> AdmittedItem:
        info = self._check_info(index, message.info)
        placeholder = _check_range(index, message.placeholder, earliest, len(token_ids))
        claimed = token_ids[placeholder.offset : placeholder.end].tolist()
        if not self._family.has_layout(info.modality):
            return self._observe_item(index, message, info, placeholder, claimed)
        layout = self._family.layout(info)
        if placeholder.length != layout.length:
            raise InvalidInputError(
                f"item {index} claims {placeholder.length} tokens; its size gives {layout.length}",
                stage=STAGE,
                item=index,
                limit=layout.length,
                actual=placeholder.length,
            )
        if claimed != layout.token_ids:
            raise InvalidInputError(
                f"item {index}: tokens {placeholder.offset} to {placeholder.end} are not its replacement",
                stage=STAGE,
                item=index,
            )
        return AdmittedItem(info, placeholder, layout, attest_tensors(index, message.tensors, layout))

    def _observe_item(
        self,
        index: int,
        message: executor_pb2.MediaItem,
        info: MediaInfo,
        placeholder: PlaceholderRange,
        token_ids: list[int],
    ) -> AdmittedItem:
        """A modality without a layout: claims within bounds are believed until the encoder has run."""
        tensors = bound_tensors(index, message.tensors)
        layout = self._family.observed_layout(info.modality, token_ids, dict(tensors))
        most = self._booted.max_tokens_per_item[info.modality]
        if layout.num_tokens > most:
            raise LimitExceededError(
                f"item {index} has {layout.num_tokens} places for features; at most {most} are allowed",
                stage=STAGE,
                item=index,
                limit=most,
                actual=layout.num_tokens,
            )
        self._check_ids_exist(index, layout)
        return AdmittedItem(info, placeholder, layout, tensors)

    def _check_ids_exist(self, index: int, layout: ItemLayout) -> None:
        """What is not a feature is looked up in the embedding."""
        largest = max((run.token_id for run in layout.replacement if not run.is_feature), default=0)
        if largest >= self._booted.vocab_size:
            raise InvalidInputError(
                f"item {index}: its range has token {largest}; the vocabulary has {self._booted.vocab_size} ids",
                stage=STAGE,
                item=index,
                limit=self._booted.vocab_size,
                actual=largest,
            )

    def _check_info(self, index: int, message: tensor_pb2.MediaInfo) -> MediaInfo:
        try:
            info = media_info_from_proto(message)
            self._family.check_modality(info.modality)
        except (ValueError, RegistryError) as error:
            raise InvalidInputError(f"item {index}: {error}", stage=STAGE, item=index) from error
        _check_facts(index, info)
        rate = self._family.ctx.sampling_rate
        if info.modality == "audio" and info.sample_rate != rate:
            raise InvalidInputError(
                f"item {index} is sampled at {info.sample_rate} Hz; the model takes {rate} Hz",
                stage=STAGE,
                item=index,
                limit=rate,
                actual=info.sample_rate,
            )
        self._family.ctx.limits.check_size(info, index)
        return info

    def _check_token_ids(self, token_ids: np.ndarray, items: Sequence[AdmittedItem]) -> None:
        """Ids are below the vocabulary; feature ids stand nowhere but in the items' ranges."""
        outside = np.ones(len(token_ids), dtype=bool)
        for item in items:
            outside[item.placeholder.offset : item.placeholder.end] = False
        too_large = outside & (token_ids >= self._booted.vocab_size)
        if too_large.any():
            place = int(too_large.argmax())
            raise InvalidInputError(
                f"token {place} of the prompt is {token_ids[place]}; the vocabulary has {self._booted.vocab_size} ids",
                stage="admit",
                limit=self._booted.vocab_size,
                actual=int(token_ids[place]),
            )
        stray = outside & np.isin(token_ids, self._feature_ids)
        if stray.any():
            place = int(stray.argmax())
            raise InvalidInputError(
                f"token {place} of the prompt is {token_ids[place]}, which stands for media features, outside of "
                "every item's range",
                stage=STAGE,
            )

    def _sampling(self, params: tensor_pb2.SamplingParams, num_prompt_tokens: int) -> SamplingParams:
        check_sampling(params, vocab_size=self._booted.vocab_size, eos_token_ids=self._booted.eos_token_ids)
        room = self._booted.max_model_len - num_prompt_tokens

        def given(name: str, default: float) -> float:
            return getattr(params, name) if params.HasField(name) else default

        return SamplingParams(
            max_tokens=min(int(given("max_tokens", room)), room),
            temperature=given("temperature", 1.0),
            top_p=given("top_p", 1.0),
            top_k=int(given("top_k", 0)),
            seed=params.seed if params.HasField("seed") else secrets.randbits(64),
            stop_token_ids=frozenset(params.stop_token_ids),
            ignore_eos=params.ignore_eos,
            logprobs=params.logprobs if params.HasField("logprobs") else None,
            min_p=params.min_p,
            prompt_logprobs=params.prompt_logprobs if params.HasField("prompt_logprobs") else None,
            repetition_penalty=given("repetition_penalty", 1.0),
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            logit_bias=tuple(sorted(params.logit_bias.items())),
            min_tokens=params.min_tokens,
            bad_words=tuple({tuple(sequence.token_ids): None for sequence in params.bad_words}),
        )


def _check_served_fields(start: executor_pb2.Start) -> None:
    for name, is_set in (("output_token_ids", bool(start.output_token_ids)), ("priority", start.HasField("priority"))):
        if is_set:
            raise UnimplementedError(f"{name} is not served yet", stage="admit", field=name)


def _check_range(index: int, message: tensor_pb2.PlaceholderRange, earliest: int, num_tokens: int) -> PlaceholderRange:
    placeholder = PlaceholderRange(message.offset, message.length)
    if placeholder.offset < earliest or placeholder.end > num_tokens:
        raise InvalidInputError(
            f"item {index} claims tokens {placeholder.offset} to {placeholder.end}; they must lie between "
            f"{earliest} and {num_tokens}, in order and without overlap",
            stage=STAGE,
            item=index,
        )
    if not placeholder.length:
        raise InvalidInputError(f"item {index} claims no tokens", stage=STAGE, item=index, limit=1, actual=0)
    return placeholder


def _check_facts(index: int, info: MediaInfo) -> None:
    """Every fact of the modality is there and above zero."""
    names = {"image": ("height", "width"), "video": ("height", "width", "num_frames", "frame_rate")}
    for name in names.get(info.modality, ("num_samples", "sample_rate")):
        value = getattr(info, name)
        if not value or not 0 < value < float("inf"):
            what = name if info.modality != "image" else "height or width"
            raise InvalidInputError(f"item {index} lacks its {what}", stage=STAGE, item=index)
