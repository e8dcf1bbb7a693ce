"""What a client sends: prompts, conversations, media, options; and the messages they become."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Final, TypedDict, TypeVar

from diptych.client.errors import RequestError
from diptych.v1 import preprocess_pb2, tensor_pb2

MODALITIES: Final = {
    "image": tensor_pb2.MODALITY_IMAGE,
    "video": tensor_pb2.MODALITY_VIDEO,
    "audio": tensor_pb2.MODALITY_AUDIO,
}
_PICTURE_BRANDS: Final = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"mif1", b"msf1")
_MODALITY_OF_SUFFIX: Final = {
    **dict.fromkeys((".wav", ".flac", ".ogg", ".oga", ".opus"), "audio"),
    **dict.fromkeys((".mp4", ".m4v", ".mov"), "video"),
}
RequestT = TypeVar(
    "RequestT", preprocess_pb2.GenerateRequest, preprocess_pb2.PlanRequest, preprocess_pb2.ProcessRequest
)


@dataclass(frozen=True, slots=True)
class Media:
    """One media item: a file's bytes, a data URL, or (for plans) the beginning of a file of `total_bytes`."""

    data: bytes = b""
    url: str | None = None
    prefix: bytes | None = None
    total_bytes: int = 0
    modality: str = "image"

    @classmethod
    def file(cls, path: str | PathLike[str], modality: str | None = None) -> Media:
        """A file's content; RequestError NOT_FOUND if it cannot be read.

        Without `modality` the content decides, or else the suffix: an animation (GIF, WebP) counts as an image
        unless "video" is asked for.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise RequestError("NOT_FOUND", f"cannot read {path}: {error.strerror}", {"path": str(path)}) from None
        return cls(data, modality=modality or guess_modality(data, Path(path).suffix))

    @classmethod
    def header(cls, prefix: bytes, total_bytes: int, modality: str = "image") -> Media:
        """The beginning of a file, for `plan`."""
        return cls(prefix=prefix, total_bytes=total_bytes, modality=modality)

    def to_proto(self) -> preprocess_pb2.Media:
        """The item as a message."""
        modality = MODALITIES.get(self.modality, tensor_pb2.MODALITY_UNSPECIFIED)
        if self.url is not None:
            return preprocess_pb2.Media(modality=modality, url=self.url)
        if self.prefix is not None:
            header = preprocess_pb2.MediaHeader(prefix=self.prefix, total_bytes=self.total_bytes)
            return preprocess_pb2.Media(modality=modality, header=header)
        return preprocess_pb2.Media(modality=modality, data=self.data)


def guess_modality(data: bytes, suffix: str = "") -> str:
    """The modality of a file by how it begins, or else by its suffix; "image" where neither says."""
    if data.startswith((b"fLaC", b"OggS")) or (data.startswith(b"RIFF") and data[8:12] == b"WAVE"):
        return "audio"
    if data[4:8] == b"ftyp" and data[8:12] not in _PICTURE_BRANDS:
        return "video"
    return _MODALITY_OF_SUFFIX.get(suffix.lower(), "image")


@dataclass(frozen=True, slots=True)
class Prompt:
    """Text in which each of the model's placeholder texts stands for one item of `media`, in order."""

    text: str
    media: Sequence[Media] = ()

    def to_proto(self) -> preprocess_pb2.Prompt:
        """The prompt as a message."""
        return preprocess_pb2.Prompt(text=self.text, media=[item.to_proto() for item in self.media])


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation: texts and media items in order."""

    role: str
    parts: Sequence[str | Media]

    def to_proto(self) -> preprocess_pb2.ChatMessage:
        """The turn as a message."""
        return preprocess_pb2.ChatMessage(role=self.role, parts=[_part(part) for part in self.parts])


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, rendered with the checkpoint's chat template."""

    messages: Sequence[Message] = field(default_factory=list)

    @classmethod
    def from_prompt(cls, text: str, media: Sequence[Media], placeholder: str | Mapping[str, str]) -> Chat:
        """One user turn: `text` split at its placeholders, an item in place of each.

        `placeholder` is the model's text for an item, or modality -> text, as in `Model.placeholders`.
        RequestError if there are not as many placeholders as items, or of other modalities.
        """
        kinds = {placeholder: None} if isinstance(placeholder, str) else {t: m for m, t in placeholder.items()}
        pattern = "|".join(map(re.escape, sorted(kinds, key=len, reverse=True)))
        pieces = re.split(f"({pattern})", text) if kinds else [text]
        texts, found = pieces[::2], pieces[1::2]
        if len(found) != len(media):
            raise RequestError(
                "INVALID_ARGUMENT",
                f"the prompt has {len(found)} media placeholders and the request has {len(media)} media items",
                {"stage": "plan", "limit": str(len(found)), "actual": str(len(media))},
            )
        for index, (text_found, item) in enumerate(zip(found, media, strict=True)):
            if kinds[text_found] not in (None, item.modality):
                raise RequestError(
                    "INVALID_ARGUMENT",
                    f"placeholder {index} of the prompt is for {kinds[text_found]}, item {index} is {item.modality}",
                    {"stage": "plan", "item": str(index)},
                )
        parts: list[str | Media] = []
        for index, piece in enumerate(texts):
            parts += [piece] if piece else []
            parts += [media[index]] if index < len(media) else []
        return cls([Message("user", parts)])

    def to_proto(self) -> preprocess_pb2.Chat:
        """The conversation as a message."""
        return preprocess_pb2.Chat(messages=[message.to_proto() for message in self.messages])


class GenerateOptions(TypedDict, total=False):
    """Options of an answer; the contract's `SamplingParams` and `GenerateRequest` say what each means.

    A bad word is a text, or a sequence of token ids.
    """

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int
    prompt_logprobs: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    min_tokens: int
    bad_words: Sequence[str | Sequence[int]]
    stop: Sequence[str]
    n: int
    priority: int
    request_id: str
    model: str


_REQUEST_FIELDS: Final = ("stop", "n", "priority", "request_id", "model")


def generate_request(prompt: Prompt | Chat, options: GenerateOptions) -> preprocess_pb2.GenerateRequest:
    """The message of a request; RequestError for a value that its field cannot hold."""
    given = {name: value for name, value in options.items() if value is not None}
    request = preprocess_pb2.GenerateRequest()
    words: Sequence[str | Sequence[int]] = given.pop("bad_words", ())  # type: ignore[assignment]
    for word in words:
        _set(request if isinstance(word, str) else request.sampling, "bad_words", word)
    for name, value in given.items():
        _set(request if name in _REQUEST_FIELDS else request.sampling, name, value)
    return _with_input(request, prompt)


def plan_request(prompt: Prompt | Chat, model: str | None) -> preprocess_pb2.PlanRequest:
    """The message of a plan."""
    return _with_input(preprocess_pb2.PlanRequest(model=model), prompt)


def process_request(prompt: Prompt | Chat, model: str | None) -> preprocess_pb2.ProcessRequest:
    """The message that asks for tensors."""
    return _with_input(preprocess_pb2.ProcessRequest(model=model), prompt)


def _with_input(request: RequestT, prompt: Prompt | Chat) -> RequestT:
    if isinstance(prompt, Chat):
        request.chat.CopyFrom(prompt.to_proto())
    else:
        request.prompt.CopyFrom(prompt.to_proto())
    return request


def _set(message: Any, name: str, value: Any) -> None:
    """Set one field; what does not fit its wire type is refused as the server would refuse it."""
    try:
        if name == "logit_bias":
            message.logit_bias.update(value)
        elif name == "bad_words":
            message.bad_words.append(value if isinstance(value, str) else tensor_pb2.TokenSequence(token_ids=value))
        elif name in ("stop", "stop_token_ids"):
            getattr(message, name).extend([value] if isinstance(value, str) else value)
        else:
            setattr(message, name, value)
    except (ValueError, TypeError) as error:
        raise RequestError(
            "INVALID_ARGUMENT", f"{name} is {value!r}: {error}", {"stage": "admit", "field": name}
        ) from None


def _part(part: str | Media) -> preprocess_pb2.ChatPart:
    if isinstance(part, Media):
        return preprocess_pb2.ChatPart(media=part.to_proto())
    return preprocess_pb2.ChatPart(text=part)
