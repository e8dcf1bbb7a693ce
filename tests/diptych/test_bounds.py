"""How much a message holds, counted on the wire: what any encoder writes is counted right, and no more is parsed."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given
from hypothesis import strategies as st

from diptych.service.errors import LimitExceededError
from diptych.v1 import executor_pb2, preprocess_pb2, tensor_pb2
from diptych.wire import bounds
from diptych.wire.bounds import check_bounds

texts = st.text(max_size=5)
media = st.builds(preprocess_pb2.Media, modality=st.integers(0, 3), data=st.binary(max_size=300))
parts = st.one_of(st.builds(preprocess_pb2.ChatPart, text=texts), st.builds(preprocess_pb2.ChatPart, media=media))
messages = st.builds(preprocess_pb2.ChatMessage, role=texts, parts=st.lists(parts, max_size=4))
sampling = st.builds(
    tensor_pb2.SamplingParams,
    temperature=st.floats(0, 2, width=32),
    seed=st.integers(0, 2**64 - 1),
    stop_token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=5),
    logit_bias=st.dictionaries(st.integers(0, 2**32 - 1), st.floats(-1, 1, width=32), max_size=4),
)
generate = st.builds(
    preprocess_pb2.GenerateRequest,
    chat=st.builds(preprocess_pb2.Chat, messages=st.lists(messages, max_size=4)),
    sampling=sampling,
    stop=st.lists(texts, max_size=3),
)
start = st.builds(executor_pb2.Start, request_id=texts, prompt_token_ids=st.lists(st.integers(0, 2**32 - 1)))
execute = st.builds(executor_pb2.ExecuteRequest, handle=st.integers(0, 2**32 - 1), start=start)
fingerprints = st.builds(executor_pb2.Fingerprint, probes=st.lists(st.floats(-1, 1, width=32), max_size=9))


@pytest.fixture(autouse=True)
def _look_at_every_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "FREE_BYTES", 0)


def held(message: Message) -> tuple[int, int]:
    """(fields, numbers in packed fields) of a message, as its Python objects say."""
    num_fields = num_values = 0
    for field, value in message.ListFields():
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            num_fields += 3 * len(value)  # an entry is a message with a key and a value
            continue
        is_list = not isinstance(value, Message | str | bytes) and hasattr(value, "__len__")
        values: list[Any] = list(value) if is_list else [value]
        if is_list and field.message_type is None and not isinstance(values[0], str | bytes):
            num_fields, num_values = num_fields + 1, num_values + len(values)
            continue
        num_fields += len(values)
        for inner in values:
            if isinstance(inner, Message):
                more_fields, more_values = held(inner)
                num_fields, num_values = num_fields + more_fields, num_values + more_values
    return num_fields, num_values


def is_within(data: bytes, message: Message, num_fields: int, num_values: int) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounds, "MAX_FIELDS", num_fields)
        patch.setattr(bounds, "MAX_VALUES", num_values)
        try:
            check_bounds(data, message.DESCRIPTOR)
        except LimitExceededError:
            return False
    return True


@given(st.one_of(generate, execute, fingerprints))
def test_every_field_and_number_is_counted(message: Message) -> None:
    data, (num_fields, num_values) = message.SerializeToString(), held(message)
    assert is_within(data, message, num_fields, num_values)
    assert not num_fields or not is_within(data, message, num_fields - 1, num_values)
    assert not num_values or not is_within(data, message, num_fields, num_values - 1)


@given(st.one_of(generate, execute), st.data())
def test_what_protobuf_takes_is_not_refused(message: Message, data: st.DataObject) -> None:
    """Whatever becomes of the bytes on their way: only what protobuf refuses, too, is called no message."""
    spoilt = bytearray(message.SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(spoilt)))
        spoilt[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    try:
        check_bounds(bytes(spoilt), message.DESCRIPTOR)
    except DecodeError:
        with pytest.raises(DecodeError):
            type(message).FromString(bytes(spoilt))


def field(number: int, data: bytes) -> bytes:
    """A field of length-delimited bytes."""
    length, varint = len(data), bytearray()
    while length > 0x7F:
        varint.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([number << 3 | 2, *varint, length]) + data


MANY = bounds.MAX_FIELDS + 1
TOO_MANY = {
    "strings": (preprocess_pb2.GenerateRequest, b"\x32\0" * MANY),
    "numbers, one by one": (preprocess_pb2.DetokenizeRequest, b"\x10\1" * MANY),
    "one number, again and again": (preprocess_pb2.GenerateRequest, b"\x38\1" * MANY),
    "a field that does not exist": (preprocess_pb2.GenerateRequest, b"\x78\1" * MANY),
    "a group that does not exist": (preprocess_pb2.GenerateRequest, b"\x7b\x7c" * MANY),
    "messages": (preprocess_pb2.GenerateRequest, field(4, b"\x0a\0" * MANY)),
    "parts of messages": (preprocess_pb2.GenerateRequest, field(4, field(1, b"\x12\0" * 100) * (MANY // 100))),
    "items of a Start": (executor_pb2.ExecuteRequest, field(2, b"\x2a\0" * MANY)),
    "packed numbers": (preprocess_pb2.DetokenizeRequest, field(2, b"\1" * (bounds.MAX_VALUES + 1))),
    "packed numbers in parts": (preprocess_pb2.DetokenizeRequest, field(2, b"\1" * 2**20) * 9),
    "packed numbers, written long": (
        preprocess_pb2.DetokenizeRequest,
        field(2, (b"\x81" * 9 + b"\0") * (bounds.MAX_VALUES + 1)),
    ),
    "many packed bytes": (preprocess_pb2.DetokenizeRequest, field(2, b"\1" * (63 << 20))),
}


@pytest.mark.parametrize("what", TOO_MANY)
def test_too_many_are_refused(what: str) -> None:
    message, data = TOO_MANY[what]
    with pytest.raises(LimitExceededError) as caught:
        check_bounds(data, message.DESCRIPTOR)
    assert caught.value.stage == "receive"
    assert caught.value.metadata["limit"] == str(bounds.MAX_VALUES if "packed" in what else bounds.MAX_FIELDS)


@pytest.mark.parametrize("data", [b"\x32", b"\x32\x05abc", b"\xff" * 12, b"\x0e\0", b"\x22\x02\x0a\x05", b"\x39\0"])
def test_what_is_no_message_is_told(data: bytes) -> None:
    for message in (preprocess_pb2.GenerateRequest, executor_pb2.ExecuteRequest):
        with pytest.raises(DecodeError):
            check_bounds(data, message.DESCRIPTOR)
        with pytest.raises(DecodeError):
            message.FromString(data)


LONG = "a" * (bounds.MAX_NAME_BYTES + 1)
TOO_LONG = {
    "model": (preprocess_pb2.GenerateRequest(model=LONG), bounds.MAX_NAME_BYTES),
    "request_id": (preprocess_pb2.GenerateRequest(request_id=LONG), bounds.MAX_NAME_BYTES),
    "stop": (preprocess_pb2.GenerateRequest(stop=["a", LONG]), bounds.MAX_NAME_BYTES),
    "role": (preprocess_pb2.PlanRequest(chat=preprocess_pb2.Chat(messages=[preprocess_pb2.ChatMessage(role=LONG)])),
             bounds.MAX_NAME_BYTES),
    "traceparent": (executor_pb2.ExecuteRequest(start=executor_pb2.Start(traceparent=LONG)), bounds.MAX_NAME_BYTES),
    "text": (preprocess_pb2.TokenizeRequest(text=LONG), 70_000),
}  # fmt: skip


@pytest.mark.parametrize("name", TOO_LONG)
def test_long_strings_are_refused_by_name(name: str) -> None:
    """Before anybody makes one of Python's of them, or puts them into an error."""
    message, limit = TOO_LONG[name]
    data, most = message.SerializeToString(), 70_000 if name == "text" else bounds.MAX_TEXT_BYTES
    if name == "text":
        check_bounds(data, message.DESCRIPTOR, most)
        data = preprocess_pb2.TokenizeRequest(text="a" * 70_001).SerializeToString()
    with pytest.raises(LimitExceededError, match=f"^{name} has ") as caught:
        check_bounds(data, message.DESCRIPTOR, most)
    assert (caught.value.stage, caught.value.metadata["limit"]) == ("receive", str(limit))


def test_an_address_is_as_long_as_it_likes_and_ascii() -> None:
    def with_url(url: str) -> bytes:
        return preprocess_pb2.Prompt(media=[preprocess_pb2.Media(url=url)]).SerializeToString()

    check_bounds(with_url("data:," + "a" * 20_000_000), preprocess_pb2.Prompt.DESCRIPTOR)
    with pytest.raises(DecodeError, match="ASCII"):
        check_bounds(with_url("data:," + "a" * 70_000 + "\U0001f642"), preprocess_pb2.Prompt.DESCRIPTOR)


def test_tags_are_as_short_as_protobuf_takes_them() -> None:
    data = b"\xb2\x80\x80\x80\x80\x00" + b"\0"
    with pytest.raises(DecodeError):
        check_bounds(data, preprocess_pb2.GenerateRequest.DESCRIPTOR)
    with pytest.raises(DecodeError):
        preprocess_pb2.GenerateRequest.FromString(data)


def test_a_group_that_nobody_knows_may_hold_anything() -> None:
    """Also a number of a field that would be a message elsewhere, with bytes that are none."""
    data = b"\x7b" + field(4, b"\xff\xff") + b"\x7c"
    preprocess_pb2.GenerateRequest.FromString(data)
    check_bounds(data, preprocess_pb2.GenerateRequest.DESCRIPTOR)
