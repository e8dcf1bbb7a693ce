"""The contract's messages to dataclasses; counts are checked before anything is built of what they count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diptych.service.errors import InvalidInputError
from diptych.v1 import preprocess_pb2
from diptych.wire.dtypes import NAME_OF_MODALITY
from preprocess_service.limits import MAX_MESSAGES, MAX_PARTS, MAX_ROLE_LENGTH, check_count, check_num_items
from preprocess_service.requests import Chat, ChatMessage, Media, MediaHeader, Prompt


def read_input(request: Any, max_items: int) -> Prompt | Chat:
    """The prompt or conversation of a request; `max_items`: what the limits of all modalities come to."""
    kind = request.WhichOneof("input")
    if kind == "prompt":
        check_num_items(len(request.prompt.media), max_items)
        media = (_read_media(item, index) for index, item in enumerate(request.prompt.media))
        return Prompt(request.prompt.text, tuple(media))
    if kind == "chat":
        _check_chat(request.chat.messages, max_items)
        return _read_chat(request.chat.messages)
    raise InvalidInputError("neither a prompt nor a chat is given", stage="admit", field="input")


def _check_chat(messages: Sequence[preprocess_pb2.ChatMessage], max_items: int) -> None:
    check_count("the chat has {} messages", len(messages), MAX_MESSAGES)
    check_count("the chat has {} parts", sum(len(message.parts) for message in messages), MAX_PARTS)
    for message in messages:
        check_count("the role of a message has {} characters", len(message.role), MAX_ROLE_LENGTH)
    check_num_items(sum(part.HasField("media") for message in messages for part in message.parts), max_items)


def _read_chat(messages: Sequence[preprocess_pb2.ChatMessage]) -> Chat:
    turns, num_items = [], 0
    for message in messages:
        parts: list[str | Media] = []
        for part in message.parts:
            kind = part.WhichOneof("part")
            if kind is None:
                raise InvalidInputError("a chat part is neither text nor media", stage="admit", field="parts")
            if kind == "media":
                parts.append(_read_media(part.media, num_items))
                num_items += 1
            else:
                parts.append(part.text)
        turns.append(ChatMessage(message.role, tuple(parts)))
    return Chat(tuple(turns))


def _read_media(media: preprocess_pb2.Media, item: int) -> Media:
    modality = NAME_OF_MODALITY.get(media.modality)
    if modality is None:
        raise InvalidInputError(f"item {item} has no modality", stage="admit", item=item, field="modality")
    kind = media.WhichOneof("source")
    if kind == "data":
        return Media(modality, media.data)
    if kind == "url":
        return Media(modality, media.url)
    if kind == "header":
        return Media(modality, MediaHeader(media.header.prefix, media.header.total_bytes))
    raise InvalidInputError(f"item {item} has neither data nor a URL", stage="admit", item=item, field="source")
