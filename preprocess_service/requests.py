"""Requests as plain dataclasses: what the pipeline works on, free of the contract's messages."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from diptych.service.errors import DeadlineError
from diptych.v1 import tensor_pb2
from registry import ItemLayout, MediaInfo, PlaceholderRange, TensorSpec

DEADLINE_MARGIN: Final = 0.005
"""Seconds before the client's deadline at which a request counts as late: the error should still arrive."""


@dataclass(frozen=True, slots=True)
class MediaHeader:
    """The beginning of a media file, and the size of the whole in bytes."""

    prefix: bytes
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Media:
    """One media item as it was sent: the file's bytes, a URL, or the file's beginning."""

    modality: str
    source: bytes | str | MediaHeader


@dataclass(frozen=True, slots=True)
class Prompt:
    """Text in which every placeholder stands for one item."""

    text: str
    media: tuple[Media, ...] = ()


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn: texts and media items in order."""

    role: str
    parts: tuple[str | Media, ...]

    @property
    def media(self) -> tuple[Media, ...]:
        """The turn's media items."""
        return tuple(part for part in self.parts if isinstance(part, Media))


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, and its media items in order, which are often asked for."""

    messages: tuple[ChatMessage, ...]
    media: tuple[Media, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Collects the items."""
        object.__setattr__(self, "media", tuple(item for message in self.messages for item in message.media))

    @property
    def texts(self) -> Iterator[str]:
        """Everything the client wrote: roles and texts."""
        for message in self.messages:
            yield message.role
            yield from (part for part in message.parts if isinstance(part, str))


@dataclass(frozen=True, slots=True)
class Deadline:
    """When the client stops waiting; `at` is on the monotonic clock, None: never."""

    at: float | None = None

    @classmethod
    def after(cls, seconds: float | None) -> Deadline:
        """The deadline `seconds` from now."""
        return cls(None if seconds is None else time.monotonic() + seconds - DEADLINE_MARGIN)

    @property
    def time_left(self) -> float | None:
        """Seconds from now, at least 0; None: no deadline."""
        return None if self.at is None else max(0.0, self.at - time.monotonic())

    def check(self, stage: str) -> None:
        """DeadlineError naming the stage if the deadline has passed."""
        if self.time_left == 0.0:
            raise DeadlineError(f"the deadline passed before stage {stage!r}", stage=stage)


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """A request for an answer. `sampling` is passed on to the executor, with the tokens of `bad_words` added."""

    input: Prompt | Chat
    request_id: str
    sampling: tensor_pb2.SamplingParams = field(default_factory=tensor_pb2.SamplingParams)
    stop: tuple[str, ...] = ()
    bad_words: tuple[str, ...] = ()
    deadline: Deadline = Deadline()
    priority: int | None = None
    num_answers: int = 1


@dataclass(frozen=True, slots=True)
class FrameChoice:
    """Which frames of a video count, and by how many degrees they are to be turned clockwise."""

    indices: tuple[int, ...]
    rotation: int = 0


@dataclass(frozen=True, slots=True)
class PlannedItem:
    """One media item of a plan. `data` are the file's bytes; None where only its header was sent.

    `layout` is None where the family has none for the modality: then `tensors` are those that the mapper
    made, known once the item has been decoded.
    """

    info: MediaInfo
    layout: ItemLayout | None
    placeholder: PlaceholderRange
    file_format: str
    media_digest: bytes | None
    data: bytes | None
    frames: FrameChoice | None = None
    num_feature_tokens: int = 0
    mapped: MappedItem | None = None

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape of each tensor the item has."""
        if self.layout is not None:
            return self.layout.tensors
        mapped = self.mapped.tensors if self.mapped is not None else {}
        return {name: TensorSpec(array.dtype.name, array.shape) for name, array in mapped.items()}


@dataclass(frozen=True, slots=True)
class MappedItem:
    """The tensors of one item, and the seconds they took."""

    tensors: dict[str, np.ndarray]
    decode_seconds: float
    map_seconds: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What a request is made of, known before anything is decoded."""

    prompt_token_ids: list[int]
    items: tuple[PlannedItem, ...]
    seconds: float

    @property
    def num_feature_tokens(self) -> int:
        """Feature tokens of all items."""
        return sum(item.num_feature_tokens for item in self.items)


@dataclass(slots=True)
class Delta:
    """A piece of answer `index`; before the first token, log probabilities of the prompt if they were asked for."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tensor_pb2.PositionLogprobs] = field(default_factory=list)
    prompt_logprobs: list[tensor_pb2.PositionLogprobs] = field(default_factory=list)
    index: int = 0


@dataclass(frozen=True, slots=True)
class TensorPiece:
    """Bytes of one tensor of item `item_index`, from byte `offset` on."""

    item_index: int
    tensor_index: int
    offset: int
    data: memoryview


@dataclass(slots=True)
class Ended:
    """The end of answer `index`; `text` is what was held back until now."""

    text: str
    finish_reason: tensor_pb2.FinishReason
    usage: tensor_pb2.Usage
    times: tensor_pb2.StageTimes
    stop: str | None = None
    index: int = 0
