"""Bad input over the wire: status, stage and message; nobody else notices; the next request works; nothing leaks."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from PIL import Image

from diptych.v1 import preprocess_pb2, tensor_pb2
from tests.integration.conftest import media, picture_bytes, prompt_request


def failure(call: Callable[[], Any]) -> tuple[str, str, dict[str, str]]:
    """(status name, message, ErrorInfo metadata) of a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    status = rpc_status.from_call(caught.value)
    info = error_details_pb2.ErrorInfo()
    if status is not None:
        assert status.details[0].Unpack(info)
        assert info.domain == "diptych.dev"
    return caught.value.code().name, caught.value.details(), dict(info.metadata)


@pytest.fixture(scope="module")
def undisturbed(served) -> list[int]:
    """The answer about picture 0 with nobody else there."""
    return tokens_of(served.stub.Generate(bystander_request(), timeout=60))


@pytest.fixture(autouse=True)
def nobody_notices(served, undisturbed: list[int]) -> Iterator[None]:
    """Another client's answer, begun before and read afterwards, is what it always is; the next request works."""
    call = served.stub.Generate(bystander_request(), timeout=60)
    begun = next(call)
    yield
    assert [*begun.token_ids, *tokens_of(call)] == undisturbed
    assert tokens_of(served.stub.Generate(bystander_request(max_tokens=3), timeout=60)) == undisturbed[:3]


def bystander_request(max_tokens: int = 40) -> preprocess_pb2.GenerateRequest:
    return prompt_request("<image> still there", [picture_bytes(0)], max_tokens=max_tokens)


def tokens_of(responses: Iterable[preprocess_pb2.GenerateResponse]) -> list[int]:
    return [token for response in responses for token in response.token_ids]


def truncated(file_format: str) -> bytes:
    data = picture_bytes(7, 200, 200, file_format)
    return data[: len(data) // 2]


def bomb() -> bytes:
    """A PNG of 7,000 x 8,000,000 pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 8_000_000, 7_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def many_pixels() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (8192, 8192)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = struct.pack(">II", 8193, 8192)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


FILES = {
    "truncated JPEG": (truncated("JPEG"), "INVALID_ARGUMENT", "decode", "truncated"),
    "truncated PNG": (truncated("PNG"), "INVALID_ARGUMENT", "decode", ""),
    "not an image": (b"hello, I am text" * 40, "INVALID_ARGUMENT", "probe", "JPEG"),
    "zero bytes": (b"", "INVALID_ARGUMENT", "probe", "0 bytes"),
    "bomb": (bomb(), "INVALID_ARGUMENT", "probe", "8192"),
    "one column too many": (many_pixels(), "INVALID_ARGUMENT", "probe", "8192"),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("position", [0, 1])
def test_bad_files(served, kind: str, position: int) -> None:
    data, code, stage, text = FILES[kind]
    pictures = [picture_bytes(1), picture_bytes(2)]
    pictures[position] = data
    request = prompt_request("<image><image>", pictures)
    status, message, facts = failure(lambda: list(served.stub.Generate(request)))
    assert (status, facts["stage"], facts["item"]) == (code, stage, str(position)), message
    assert text in message
    assert f"item {position}" in message


def test_too_many_images(served) -> None:
    request = prompt_request("<image>" * 5, [picture_bytes(i) for i in range(5)])
    status, message, facts = failure(lambda: list(served.stub.Generate(request)))
    assert (status, facts["limit"], facts["actual"]) == ("INVALID_ARGUMENT", "4", "5")
    assert "5 image items" in message


def test_too_long_a_prompt(served) -> None:
    status, message, facts = failure(lambda: list(served.stub.Generate(prompt_request("word " * 9000, []))))
    assert status == "INVALID_ARGUMENT"
    assert facts["limit"] == "2047"
    assert facts["actual"] in message


def test_unknown_model(served) -> None:
    request = prompt_request("hi", [])
    request.model = "another"
    status, message, _ = failure(lambda: list(served.stub.Generate(request)))
    assert status == "NOT_FOUND"
    assert "another" in message
    assert served.checkpoint.name in message


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -0.5), ("temperature", float("nan")), ("temperature", float("inf")), ("top_p", 0.0),
     ("top_p", 1.5), ("max_tokens", 0), ("logprobs", 21), ("stop_token_ids", [10**9]), ("stop_token_ids", [1] * 65),
     ("min_p", -0.1), ("min_p", 1.5), ("prompt_logprobs", 21), ("repetition_penalty", 0.0),
     ("repetition_penalty", float("inf")), ("presence_penalty", 2.5), ("frequency_penalty", float("nan")),
     ("logit_bias", {328: 1.0}), ("logit_bias", {5: 101.0}), ("logit_bias", dict.fromkeys(range(1025), 1.0)),
     ("min_tokens", 11), ("bad_words", [tensor_pb2.TokenSequence()]),
     ("bad_words", [tensor_pb2.TokenSequence(token_ids=[328])]),
     ("bad_words", [tensor_pb2.TokenSequence(token_ids=[5])] * 257)],
)  # fmt: skip
def test_bad_sampling_values(served, field: str, value: object) -> None:
    request = prompt_request("hi", [], **{field: value})
    status, message, facts = failure(lambda: list(served.stub.Generate(request)))
    assert (status, facts["stage"], facts["field"]) == ("INVALID_ARGUMENT", "admit", field)
    assert field in message
    assert {"limit", "actual"} <= set(facts)


@pytest.mark.parametrize(("text", "count"), [("none", 1), ("<image>", 0), ("<image><image>", 1), ("<image>", 2)])
def test_placeholders_and_items_disagree(served, text: str, count: int) -> None:
    request = prompt_request(text, [picture_bytes(i) for i in range(count)])
    status, message, facts = failure(lambda: list(served.stub.Generate(request)))
    assert status == "INVALID_ARGUMENT"
    assert f"{text.count('<image>')} media placeholders" in message
    assert f"{count} media items" in message
    assert facts["stage"] == "plan"


def test_message_over_the_receive_limit(served) -> None:
    request = prompt_request("<image>", [bytes(65 * 1024 * 1024)])
    status, message, _ = failure(lambda: list(served.stub.Generate(request)))
    assert status == "RESOURCE_EXHAUSTED"
    assert str(64 * 1024 * 1024) in message


def test_empty_requests(served) -> None:
    for request, text in (
        (preprocess_pb2.GenerateRequest(), "neither a prompt nor a chat is given"),
        (prompt_request("", []), "the prompt is empty"),
        (preprocess_pb2.GenerateRequest(chat=preprocess_pb2.Chat()), "no messages"),
    ):
        status, message, facts = failure(lambda request=request: list(served.stub.Generate(request)))
        assert (status, facts["stage"]) == ("INVALID_ARGUMENT", "admit")
        assert text in message


def test_media_without_a_source_or_modality(served) -> None:
    for item, text in (
        (preprocess_pb2.Media(modality=1), "item 0 has neither data nor a URL"),
        (preprocess_pb2.Media(data=picture_bytes(1)), "item 0 has no modality"),
    ):
        request = preprocess_pb2.GenerateRequest(prompt=preprocess_pb2.Prompt(text="<image>", media=[item]))
        status, message, facts = failure(lambda request=request: list(served.stub.Generate(request)))
        assert (status, facts["stage"], facts["item"]) == ("INVALID_ARGUMENT", "admit", "0")
        assert message == text


URLS = {
    "data:image/png;base64,@@@": ("INVALID_ARGUMENT", "item 0: the data URL is not valid base64"),
    "data:nonsense": ("INVALID_ARGUMENT", "item 0: a data URL has the form"),
    "https://example.org/cat.png": ("UNIMPLEMENTED", "item 0: URLs with scheme 'https' are not served"),
    "cat": ("INVALID_ARGUMENT", "item 0: 'cat' is not a URL"),
}


@pytest.mark.parametrize("url", URLS)
def test_bad_urls(served, url: str) -> None:
    code, text = URLS[url]
    item = preprocess_pb2.Media(modality=1, url=url)
    request = preprocess_pb2.GenerateRequest(prompt=preprocess_pb2.Prompt(text="<image>", media=[item]))
    status, message, facts = failure(lambda: list(served.stub.Generate(request)))
    assert (status, facts["stage"], facts["item"]) == (code, "fetch", "0")
    assert text in message


def test_client_gone_while_decoding(served) -> None:
    big = picture_bytes(3, 3000, 3000, "PNG")
    for _ in range(3):
        call = served.stub.Generate(prompt_request("<image><image>", [big, big]))
        call.cancel()
        served.check_idle()


def test_client_gone_while_generating(served) -> None:
    call = served.stub.Generate(prompt_request("<image>", [picture_bytes(1)], max_tokens=1000))
    next(call)
    call.cancel()
    served.check_idle()


def test_plan_reads_headers_only(served) -> None:
    """A body of garbage behind a good header changes nothing, since nobody looks at it."""
    good = picture_bytes(9, 120, 90, "JPEG")
    start = good.index(b"\xff\xda") + 20
    garbage = good[:start] + b"\x00" * (len(good) - start)
    for data in (good, garbage):
        prompt = preprocess_pb2.Prompt(text="<image> x", media=[media(data)])
        plan = served.stub.Plan(preprocess_pb2.PlanRequest(prompt=prompt))
        assert (plan.items[0].info.height, plan.items[0].info.width) == (120, 90)
        assert plan.items[0].placeholder.length == 16
    request = prompt_request("<image> x", [truncated("PNG")])
    plan = served.stub.Plan(preprocess_pb2.PlanRequest(prompt=request.prompt))
    assert plan.items[0].num_feature_tokens == 16
    assert failure(lambda: list(served.stub.Generate(request)))[0] == "INVALID_ARGUMENT"
