"""Admission: everything a Start claims is checked against the family before anything is allocated.

Attestation recomputes each item's layout from its header facts: the range, its tokens and every tensor's
name, dtype and shape must be what the layout says.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from diptych.service.errors import (
    IncompatibleError,
    InvalidInputError,
    LimitExceededError,
)
from diptych.service.media_errors import from_media_error
from diptych.service.request_ids import check_request_id
from diptych.service.sampling import check_sampling
from diptych.v1 import executor_pb2, tensor_pb2
from diptych.wire.media import media_info_from_proto
from executor_service.engine.messages import Booted, SamplingParams
from executor_service.front.arena import aligned
from executor_service.front.claims import STAGE, NamedSpecs, attest_tensors, bound_tensors
from registry import ItemLayout, MediaInfo, PlaceholderRange, TensorSpec
from registry.errors import MediaError, RegistryError
from registry.family import ModelFamily

DIGEST_BYTES: Final = 32
_FACTS: Final = {
    "image": ("height", "width"),
    "video": ("height", "width", "num_frames", "frame_rate"),
    "audio": ("num_samples", "sample_rate"),
}
"""What a header says, by modality."""
_ALL_FACTS: Final = frozenset(name for names in _FACTS.values() for name in names)


@dataclass(frozen=True)
class AdmittedItem:
    """An item whose claims hold; `tensors` in the order of the Start, `inline` the bytes that came with it."""

    info: MediaInfo
    placeholder: PlaceholderRange
    layout: ItemLayout
    tensors: tuple[tuple[str, TensorSpec], ...]
    media_digest: bytes | None = None
    inline: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def region_bytes(self) -> int:
        """Bytes it takes in the arena."""
        return sum(aligned(spec.num_bytes) for _, spec in self.tensors)


@dataclass(frozen=True)
class AdmittedRequest:
    """A Start whose claims hold."""

    request_id: str
    prompt_token_ids: list[int]
    items: tuple[AdmittedItem, ...]
    sampling: SamplingParams
    time_left: float | None
    priority: int = 0
    output_token_ids: Sequence[int] = ()

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
        check_request_id(start.request_id)
        # Counted before anything walks over them: a message may hold millions.
        self._check_length(len(start.prompt_token_ids))
        token_ids = np.fromiter(start.prompt_token_ids, dtype=np.int64, count=len(start.prompt_token_ids))
        items = self._attest_items(start.items, token_ids)
        self._check_token_ids(token_ids, items)
        sampling = self._sampling(start.sampling, len(token_ids))
        return AdmittedRequest(
            request_id=start.request_id,
            prompt_token_ids=token_ids.tolist(),
            items=tuple(items),
            sampling=sampling,
            priority=start.priority,
            output_token_ids=self._check_output(start.output_token_ids, sampling),
            time_left=start.time_left.ToNanoseconds() / 1e9 if start.HasField("time_left") else None,
        )

    def _check_fingerprint(self, digest: bytes) -> None:
        if digest != self._booted.fingerprint.digest:
            raise IncompatibleError(
                f"the sender's fingerprint is {digest[:DIGEST_BYTES].hex() or 'empty'}, this executor's is "
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
        _check_digest(index, message)
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
        return _admitted(message, info, placeholder, layout, attest_tensors(index, message.tensors, layout))

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
        return _admitted(message, info, placeholder, layout, tensors)

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
        # Compared one by one: they are few, and `np.isin` takes longer to begin than this to end.
        stray = outside & (token_ids == self._feature_ids[:, None]).any(axis=0)
        if stray.any():
            place = int(stray.argmax())
            raise InvalidInputError(
                f"token {place} of the prompt is {token_ids[place]}, which stands for media features, outside of "
                "every item's range",
                stage=STAGE,
            )

    def _check_output(self, token_ids: Sequence[int], sampling: SamplingParams) -> list[int]:
        """Tokens that another executor has given: some are left to generate, and none of them ended the answer."""
        if len(token_ids) >= sampling.max_tokens:
            raise LimitExceededError(
                f"output_token_ids has {len(token_ids)} tokens; at most {sampling.max_tokens} may be generated in all",
                stage="admit",
                limit=sampling.max_tokens - 1,
                actual=len(token_ids),
            )
        given = list(token_ids)
        ends = sampling.stop_token_ids | (frozenset() if sampling.ignore_eos else self._booted.eos_token_ids)
        for index, token_id in enumerate(given):
            if token_id >= self._booted.vocab_size or token_id in self._feature_ids:
                raise InvalidInputError(f"output_token_ids[{index}] is {token_id}: no text token", stage="admit")
            if token_id in ends:
                raise InvalidInputError(f"output_token_ids[{index}] is {token_id}, which ends an answer", stage="admit")
        return given

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


def _admitted(
    message: executor_pb2.MediaItem,
    info: MediaInfo,
    placeholder: PlaceholderRange,
    layout: ItemLayout,
    tensors: NamedSpecs,
) -> AdmittedItem:
    digest = message.media_digest if message.HasField("media_digest") else None
    inline = {tensor.name: tensor.data for tensor in message.tensors if tensor.WhichOneof("payload") == "data"}
    return AdmittedItem(info, placeholder, layout, tensors, digest, inline)


def _check_digest(index: int, message: executor_pb2.MediaItem) -> None:
    if message.HasField("media_digest") and len(message.media_digest) != DIGEST_BYTES:
        raise InvalidInputError(
            f"item {index} has a media digest of {len(message.media_digest)} bytes; SHA-256 has {DIGEST_BYTES}",
            stage=STAGE,
            item=index,
            limit=DIGEST_BYTES,
            actual=len(message.media_digest),
        )


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
    """Every fact of the modality is there and above zero, and none of another modality."""
    names = _FACTS[info.modality]
    for name in names:
        value = getattr(info, name)
        if not value or not 0 < value < float("inf"):
            what = name if info.modality != "image" else "height or width"
            raise InvalidInputError(f"item {index} lacks its {what}", stage=STAGE, item=index)
    for name in _ALL_FACTS - set(names):
        if getattr(info, name) is not None:
            raise InvalidInputError(
                f"item {index} claims {name} {getattr(info, name):g}, which {info.modality} items do not have",
                stage=STAGE,
                item=index,
            )
