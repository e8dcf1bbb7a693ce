"""How much a message holds, counted on the wire before anything is made of it.

A field of two bytes becomes an object of a hundred, and 64 MiB hold 30 million of them: to parse that takes seconds, in
which nothing else runs. What is counted here is what https://protobuf.dev/programming-guides/encoding describes.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from diptych.service.errors import LimitExceededError

FREE_BYTES: Final = 64 * 1024
"""Smaller messages are not looked at: they are parsed in no time, whatever they are."""
MAX_FIELDS: Final = 65_536
"""Fields of a message and of all messages in it, those that the contract does not know included."""
MAX_VALUES: Final = 4 * 1024 * 1024
"""Numbers in packed fields."""
MAX_NAME_BYTES: Final = 64 * 1024
"""Of a string that is no text: names, ids, stop strings."""
MAX_TEXT_BYTES: Final = 8 * 1024 * 1024
"""Of a field called `text`, unless the service says otherwise. Addresses (`url`) may be as long as the message."""
_TEXT, _ADDRESS = "text", "url"
_VARINT, _FIXED64, _BYTES, _GROUP, _GROUP_END, _FIXED32 = range(6)
_CONTINUED: Final = bytes(range(0x80, 0x100))
_MAX_VARINT, _MAX_TAG = 10, 5
_WIDTHS: Final = {
    **dict.fromkeys((FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FIXED64, FieldDescriptor.TYPE_SFIXED64), 8),
    **dict.fromkeys((FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_FIXED32, FieldDescriptor.TYPE_SFIXED32), 4),
}

_Fields = dict[int, "_Fields | int | str"]
"""By field number: the fields of the message that it is, or the width of its packed numbers, 0 for varints, or the name
of the string that it is. Of bytes, and of fields that the contract does not know, there is nothing to know."""


def check_bounds(data: bytes, message: Descriptor, max_text_bytes: int = MAX_TEXT_BYTES) -> None:
    """LimitExceededError if the message has more, or longer strings, than any request needs; DecodeError if it is none.

    Takes half a microsecond per field, one or two where numbers are written longer than they are.
    """
    if len(data) <= FREE_BYTES:
        return
    try:
        _walk(data, _fields(message), max_text_bytes)
    except IndexError as error:
        raise DecodeError("the message ends within a field") from error


def check_readable(message: Message) -> None:
    """LimitExceededError if whoever receives this message will not read it."""
    if message.ByteSize() > FREE_BYTES:
        descriptor: Any = message.DESCRIPTOR
        check_bounds(message.SerializeToString(), descriptor)


def _walk(data: bytes, fields: _Fields, max_text_bytes: int) -> None:
    at, end, num_fields, num_values, num_groups = 0, len(data), 0, 0, 0
    outer: list[tuple[_Fields, int]] = []
    while at < end or outer:
        if at >= end:
            (fields, end), within = outer.pop(), end
            if at > within:
                raise DecodeError("a field is longer than its message")
            continue
        num_fields += 1
        if num_fields > MAX_FIELDS:
            raise _too_many("fields", num_fields, MAX_FIELDS)
        tag, at = _varint(data, at, _MAX_TAG)
        kind = tag & 7
        if kind == _BYTES:
            length, at = _varint(data, at)
            known, stop = None if num_groups else fields.get(tag >> 3), at + length
            if stop > end:
                raise DecodeError("a field is longer than its message")
            if isinstance(known, dict):
                outer.append((fields, end))
                fields, end = known, stop
                continue
            if isinstance(known, str):
                _check_string(data, at, length, known, max_text_bytes)
            elif known is not None:
                num_values += _num_packed(data, at, stop, known)
                if num_values > MAX_VALUES:
                    raise _too_many("numbers", num_values, MAX_VALUES)
            at = stop
        else:
            at = _after(data, at, kind)
            num_groups += (kind == _GROUP) - (kind == _GROUP_END)
    if at > end:
        raise DecodeError("the message ends within a field")


def _after(data: bytes, at: int, kind: int) -> int:
    """Where a field ends that has no length; what is in a group, which the contract has none of, is counted like it."""
    if kind == _VARINT:
        return _varint(data, at)[1]
    if kind in (_FIXED64, _FIXED32):
        return at + (8 if kind == _FIXED64 else 4)
    if kind in (_GROUP, _GROUP_END):
        return at
    raise DecodeError(f"wire type {kind} does not exist")


def _varint(data: bytes, at: int, most: int = _MAX_VARINT) -> tuple[int, int]:
    """(value, position after it); IndexError where the data end."""
    value = data[at]
    if value < 0x80:
        return value, at + 1
    value &= 0x7F
    for position in range(1, most):
        byte = data[at + position]
        value |= (byte & 0x7F) << 7 * position
        if byte < 0x80:
            return value, at + position + 1
    raise DecodeError("a varint without end")


def _check_string(data: bytes, at: int, length: int, name: str, max_text_bytes: int) -> None:
    """A long one takes seconds to become one of Python's, and to be told in an error; an address is ASCII."""
    if length <= MAX_NAME_BYTES:
        return
    limit = {_TEXT: max_text_bytes, _ADDRESS: length}.get(name, MAX_NAME_BYTES)
    if length > limit:
        raise LimitExceededError(
            f"{name} has {length} bytes; at most {limit} are read", stage="receive", limit=limit, actual=length
        )
    if name == _ADDRESS and not data[at : at + length].isascii():
        raise DecodeError("an address has characters beyond ASCII")


def _num_packed(data: bytes, begin: int, end: int, width: int) -> int:
    """Numbers in a packed field; of varints so many that they are too many for certain, or exactly."""
    if width:
        return (end - begin) // width
    if end - begin > _MAX_VARINT * MAX_VALUES:
        return MAX_VALUES + 1
    return len(data[begin:end].translate(None, _CONTINUED))  # each ends with the one byte below 0x80 that it has


def _too_many(what: str, number: int, limit: int) -> LimitExceededError:
    return LimitExceededError(f"the message has more than {limit} {what}", stage="receive", limit=limit, actual=number)


@cache
def _fields(message: Descriptor) -> _Fields:
    """What is to be looked into; the contract's messages do not contain themselves."""
    return {field.number: known for field in message.fields if (known := _field(field)) is not None}


def _field(field: FieldDescriptor) -> _Fields | int | str | None:
    if field.message_type is not None:
        return _fields(field.message_type)
    if field.type == FieldDescriptor.TYPE_STRING:
        return str(field.name)
    return None if field.type == FieldDescriptor.TYPE_BYTES else _WIDTHS.get(field.type, 0)
