"""The whole service over gRPC, in front of a stand-in executor, with both kinds of streams."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.rpc import code_pb2, status_pb2

from diptych.client import AsyncClient, Chat, Media, Message, Prompt, RequestError
from diptych.service.lifecycle import running
from diptych.v1 import preprocess_pb2, preprocess_pb2_grpc, tensor_pb2
from preprocess_service.planning import Checkpoint
from preprocess_service.server import SERVICE_NAME, PreprocessServer
from preprocess_service.settings import PreprocessSettings
from registry import MediaInfo, MediaItem
from tests.preprocess_service.serving import words
from tests.stand_in_executor import StandInExecutor, eventually
from tests.tiny_checkpoint import data_url, encoded, picture

PNG = encoded(picture())
IMAGE = Media(PNG)


async def failure(client: AsyncClient, prompt: Prompt | Chat, **options: object) -> RequestError:
    with pytest.raises(RequestError) as caught:
        await client.generate(prompt, **options)  # type: ignore[arg-type]
    return caught.value


async def test_text_alone(client: AsyncClient, executor: StandInExecutor, checkpoint: Checkpoint) -> None:
    executor.script = lambda start: words(checkpoint, "Größe 図書館!")
    answer = await client.generate(Prompt("Hello"), max_tokens=100)
    assert answer.text == "Größe 図書館!"
    assert answer.token_ids == words(checkpoint, "Größe 図書館!")
    assert answer.final is not None
    assert answer.final.finish_reason == "length"
    assert answer.final.times["prefill"] == 0.25
    assert answer.final.times["plan"] > 0
    assert "decode_media" not in answer.final.times
    start = executor.requests[-1].start
    assert list(start.prompt_token_ids) == checkpoint.tokenizer.encode("Hello")
    assert start.fingerprint == checkpoint.fingerprint.digest
    assert not start.HasField("time_left")
    assert start.request_id


@pytest.mark.parametrize("window", [1 << 20, 1000, 1])
async def test_tensors_arrive_whole_under_any_credit(
    client: AsyncClient, executor: StandInExecutor, checkpoint: Checkpoint, window: int
) -> None:
    executor.window = window
    items = [IMAGE] if window == 1 else [Media(encoded(picture(20 + n, 50, seed=n))) for n in range(3)]
    answer = await client.generate(Prompt("<image>" * len(items) + " what?", items), max_tokens=3)
    assert len(answer.token_ids) == 3
    assert answer.final is not None
    assert answer.final.times["decode_media"] > 0
    request = executor.requests[-1]
    for item, sent, received in zip(items, request.start.items, request.received, strict=True):
        height, width = sent.info.height, sent.info.width
        seed, size = (items.index(item), (20 + items.index(item), 50)) if window > 1 else (0, (30, 40))
        assert (height, width) == size
        image = picture(*size, seed=seed)
        expected = checkpoint.family.map_item(MediaItem(MediaInfo.image(height, width), image))["pixel_values"]
        assert sent.tensors[0].name == "pixel_values"
        assert list(sent.tensors[0].shape) == [3, 28, 28]
        np.testing.assert_array_equal(np.frombuffer(received[0], np.uint8).reshape(3, 28, 28), expected)
        assert sent.media_digest == hashlib.sha256(checkpoint.fingerprint.digest + item.data).digest()
        assert sent.placeholder.length == 4


async def test_many_requests_at_once(client: AsyncClient, executor: StandInExecutor, checkpoint: Checkpoint) -> None:
    executor.delay = 0.001
    prompts = [f"number {n}" for n in range(8)]
    answers = await asyncio.gather(*(client.generate(Prompt(text), max_tokens=64) for text in prompts))
    assert [answer.text for answer in answers] == prompts


async def test_streams_are_shared_or_not(
    server: PreprocessServer, client: AsyncClient, executor: StandInExecutor
) -> None:
    before = executor.num_streams
    await asyncio.gather(*(client.generate(Prompt("x"), max_tokens=1) for _ in range(4)))
    is_shared = server._settings.executor_streams == "shared"
    assert executor.num_streams - before == (0 if is_shared and before else 1 if is_shared else 4)


async def test_chat_with_pictures_and_literal_placeholders(
    client: AsyncClient, executor: StandInExecutor, checkpoint: Checkpoint
) -> None:
    chat = Chat([Message("user", ["is <image> a tag?", IMAGE, "or <im", "age>"]), Message("assistant", ["yes"])])
    await client.generate(chat, max_tokens=1)
    start = executor.requests[-1].start
    text = checkpoint.tokenizer.decode(list(start.prompt_token_ids), skip_special_tokens=False)
    pictures = "<image>" * 4
    assert text == f"<s>USER: is <image> a tag?{pictures}\nor <image> ASSISTANT: yes ASSISTANT:"
    assert list(start.prompt_token_ids).count(3) == 4


async def test_a_data_url(client: AsyncClient, executor: StandInExecutor) -> None:
    await client.generate(Prompt("<image>", [Media(url=data_url(PNG))]), max_tokens=1)
    assert executor.requests[-1].is_complete


async def test_logprobs_are_parallel_to_tokens(client: AsyncClient) -> None:
    answer = await client.generate(Prompt("some words"), max_tokens=4, logprobs=1)
    assert [entry.token_id for entry in answer.logprobs] == answer.token_ids
    assert answer.logprobs[0].top == ((answer.token_ids[0], -1.5),)


async def test_a_client_that_goes_away_cancels(client: AsyncClient, executor: StandInExecutor) -> None:
    executor.delay = 0.01
    stream = client.stream(Prompt("many words to say one after another"))
    async for _ in stream:
        break
    await stream.aclose()  # type: ignore[attr-defined]
    await eventually(executor.requests[-1].cancelled.is_set)
    assert (await client.generate(Prompt("next"), max_tokens=1)).final is not None


async def test_a_deadline_names_the_stage(client: AsyncClient, executor: StandInExecutor) -> None:
    executor.delay = 0.02
    error = await failure(client, Prompt("many words to say one after another, very slowly indeed"), timeout=0.2)
    assert error.code == "DEADLINE_EXCEEDED"
    assert error.details.get("stage") == "generate"
    assert 0 < executor.requests[-1].start.time_left.ToMilliseconds() <= 200
    await eventually(executor.requests[-1].cancelled.is_set)


async def test_what_the_executor_refuses_is_passed_on(client: AsyncClient, executor: StandInExecutor) -> None:
    executor.refusal = status_pb2.Status(code=code_pb2.RESOURCE_EXHAUSTED, message="no blocks today")
    error = await failure(client, Prompt("<image>", [IMAGE]))
    assert (error.code, error.message) == ("RESOURCE_EXHAUSTED", "no blocks today")


@pytest.mark.parametrize(
    ("prompt", "options", "code", "stage", "text"),
    [
        (Prompt("x"), {"temperature": -1.0}, "INVALID_ARGUMENT", "admit", "temperature is -1"),
        (Prompt("x"), {"temperature": float("nan")}, "INVALID_ARGUMENT", "admit", "temperature is nan"),
        (Prompt("x"), {"temperature": float("inf")}, "INVALID_ARGUMENT", "admit", "temperature is inf"),
        (Prompt("x"), {"top_p": 0.0}, "INVALID_ARGUMENT", "admit", "top_p is 0; it must be above 0"),
        (Prompt("x"), {"max_tokens": 0}, "INVALID_ARGUMENT", "admit", "max_tokens is 0"),
        (Prompt("x"), {"max_tokens": -1}, "INVALID_ARGUMENT", "admit", "max_tokens is -1"),
        (Prompt("x"), {"logprobs": 21}, "INVALID_ARGUMENT", "admit", "logprobs is 21"),
        (Prompt("x"), {"stop_token_ids": [1] * 65}, "INVALID_ARGUMENT", "admit", "65 ids; at most 64"),
        (Prompt("x"), {"stop_token_ids": [600]}, "INVALID_ARGUMENT", "admit", "ids are below 600"),
        (Prompt("x"), {"stop": ["a"] * 17}, "INVALID_ARGUMENT", "admit", "stop has 17 texts; at most 16"),
        (Prompt("x"), {"stop": [""]}, "INVALID_ARGUMENT", "admit", "empty"),
        (Prompt("x"), {"stop": ["a" * 257]}, "INVALID_ARGUMENT", "admit", "257 characters; at most 256"),
        (Prompt("x"), {"request_id": "a" * 129}, "INVALID_ARGUMENT", "admit", "129 characters; at most 128"),
        (Prompt("x"), {"model": "other"}, "NOT_FOUND", "admit", "'other' is not served"),
        (Prompt("x"), {"n": 0}, "INVALID_ARGUMENT", "admit", "n is 0"),
        (Prompt("x"), {"n": 1000}, "INVALID_ARGUMENT", "admit", "n is 1000"),
        (Prompt("x"), {"min_p": 1.1}, "INVALID_ARGUMENT", "admit", "min_p is 1.1; it must be at least 0"),
        (Prompt("x"), {"prompt_logprobs": 21}, "INVALID_ARGUMENT", "admit", "prompt_logprobs is 21"),
        (Prompt("x"), {"repetition_penalty": 0.0}, "INVALID_ARGUMENT", "admit", "repetition_penalty is 0"),
        (Prompt("x"), {"presence_penalty": 2.5}, "INVALID_ARGUMENT", "admit", "presence_penalty is 2.5"),
        (Prompt("x"), {"frequency_penalty": -2.5}, "INVALID_ARGUMENT", "admit", "frequency_penalty is -2.5"),
        (Prompt("x"), {"logit_bias": {1: 200.0}}, "INVALID_ARGUMENT", "admit", "logit_bias of token 1 is 200"),
        (Prompt("x"), {"logit_bias": {600: 1.0}}, "INVALID_ARGUMENT", "admit", "ids are below 600"),
        (Prompt("x"), {"min_tokens": 3, "max_tokens": 2}, "INVALID_ARGUMENT", "admit", "min_tokens is 3"),
        (Prompt("x"), {"bad_words": [""]}, "INVALID_ARGUMENT", "admit", "a bad word is empty"),
        (Prompt("x"), {"bad_words": ["a" * 129]}, "INVALID_ARGUMENT", "admit", "129 characters; at most 128"),
        (Prompt("x"), {"bad_words": ["a"] * 129}, "INVALID_ARGUMENT", "admit", "bad_words has 129 texts; at most 128"),
        (Prompt("x"), {"bad_words": [[]]}, "INVALID_ARGUMENT", "admit", "0 ids"),
        (Prompt("x"), {"bad_words": [[7]] * 255 + ["ab"]}, "INVALID_ARGUMENT", "admit", "257 token sequences"),
        (Prompt(""), {}, "INVALID_ARGUMENT", "admit", "the prompt is empty"),
        (Chat([]), {}, "INVALID_ARGUMENT", "admit", "no messages"),
        (Prompt("<image> <image>", [IMAGE]), {}, "INVALID_ARGUMENT", "plan", "2 media placeholders and the"),
        (Prompt("none", [IMAGE]), {}, "INVALID_ARGUMENT", "plan", "0 media placeholders and the"),
        (Prompt("<image>" * 5, [IMAGE] * 5), {}, "INVALID_ARGUMENT", "admit", "5 image items; at most 4"),
        (Prompt("word " * 600), {}, "INVALID_ARGUMENT", "plan", "at most 511 fit"),
        (Prompt("<image>", [Media(b"")]), {}, "INVALID_ARGUMENT", "probe", "empty file"),
        (Prompt("<image>", [Media(b"not an image at all")]), {}, "INVALID_ARGUMENT", "probe", "not a supported image"),
        (Prompt("<image>", [Media(PNG[:20])]), {}, "INVALID_ARGUMENT", "probe", "truncated"),
        (Prompt("<image>", [Media(PNG[:-200])]), {}, "INVALID_ARGUMENT", "decode", "cannot be decoded"),
        (Prompt("<image>", [Media(modality="video")]), {}, "INVALID_ARGUMENT", "admit", "does not support video items"),
        (Prompt("<image>", [Media(modality="audio")]), {}, "INVALID_ARGUMENT", "admit", "does not support audio items"),
        (Prompt("<image>", [Media(modality="smell")]), {}, "INVALID_ARGUMENT", "admit", "no modality"),
        (Prompt("<image>", [Media(url="https://x/y.png")]), {}, "UNIMPLEMENTED", "fetch", "'https'"),
        (Prompt("<image>", [Media.header(PNG[:64], len(PNG))]), {}, "INVALID_ARGUMENT", "admit", "only a header"),
    ],
)  # fmt: skip
async def test_bad_input(
    client: AsyncClient,
    executor: StandInExecutor,
    prompt: Prompt | Chat,
    options: dict[str, object],
    code: str,
    stage: str,
    text: str,
) -> None:
    error = await failure(client, prompt, **options)
    assert (error.code, error.details.get("stage")) == (code, stage), error
    assert text in error.message
    if stage in ("probe", "decode", "fetch"):
        assert error.details["item"] == "0"
    for request in executor.requests:  # whatever had begun is told to stop
        await eventually(request.cancelled.is_set)
    assert (await client.generate(Prompt("next"), max_tokens=1)).final is not None


async def test_a_decompression_bomb_is_refused_before_decoding(client: AsyncClient) -> None:
    bomb = encoded(picture(1, 9000))
    error = await failure(client, Prompt("<image>", [Media(bomb)]))
    assert (error.code, error.details["stage"]) == ("INVALID_ARGUMENT", "probe")
    assert (error.details["limit"], error.details["actual"]) == ("8192", "9000")


async def test_a_message_over_the_receive_limit(client: AsyncClient) -> None:
    error = await failure(client, Prompt("<image>", [Media(bytes(64 * 1024 * 1024 + 1))]))
    assert error.code == "RESOURCE_EXHAUSTED"


async def test_a_full_service_says_when_to_come_back(client: AsyncClient, executor: StandInExecutor) -> None:
    executor.delay = 0.05
    streams = [client.stream(Prompt("some words to keep it busy")) for _ in range(8)]
    for stream in streams:
        await anext(stream)
    error = await failure(client, Prompt("one more"))
    assert (error.code, error.details["limit"]) == ("RESOURCE_EXHAUSTED", "8")
    assert error.details["retry_after"] == "0.5"
    for stream in streams:
        await stream.aclose()  # type: ignore[attr-defined]
    await eventually(lambda: all(request.cancelled.is_set() for request in executor.requests))


async def test_every_answer_counts(client: AsyncClient, executor: StandInExecutor) -> None:
    """Of eight at a time: three run, and six more are too many for now; nine are too many at any time."""
    executor.delay = 0.05
    streams = [client.stream(Prompt("some words to keep it busy")) for _ in range(3)]
    for stream in streams:
        await anext(stream)
    with pytest.raises(RequestError) as caught:
        await client.generate_all(Prompt("more"), n=6)
    assert (caught.value.code, caught.value.details["actual"]) == ("RESOURCE_EXHAUSTED", "9")
    assert "3 requests are being worked on and 6 more come" in caught.value.message
    for stream in streams:
        await stream.aclose()  # type: ignore[attr-defined]
    await eventually(lambda: all(request.cancelled.is_set() for request in executor.requests))
    with pytest.raises(RequestError, match=r"9 answers are asked for; at most 8 .*--max-pending-requests") as caught:
        await client.generate_all(Prompt("more"), n=9)
    assert (caught.value.code, caught.value.details["retryable"]) == ("INVALID_ARGUMENT", "false")
    for _ in range(5):  # every answer gives its place back: fifteen would not fit
        assert len(await client.generate_all(Prompt("more"), n=3, max_tokens=1)) == 3


@pytest.mark.parametrize("letter", ["m", "é", "😀", "%"])
async def test_what_clients_wrote_does_not_make_the_error_another_one(server: PreprocessServer, letter: str) -> None:
    """Names of any length, cut: clients take 8 KiB of metadata."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = preprocess_pb2_grpc.PreprocessServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Tokenize(preprocess_pb2.TokenizeRequest(model=letter * 5000, text="x"))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        assert f"model '{letter * 100}" in (caught.value.details() or "")
        media = preprocess_pb2.Media(modality=tensor_pb2.MODALITY_IMAGE, url="s" * 5000 + "://x")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Plan(preprocess_pb2.PlanRequest(prompt=preprocess_pb2.Prompt(text="<image>", media=[media])))
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_plan_reads_headers_alone(client: AsyncClient, executor: StandInExecutor, checkpoint: Checkpoint) -> None:
    garbage = PNG[:60] + bytes(len(PNG) - 60)
    plan = await client.plan(Prompt("<image> hi", [Media(garbage)]))
    assert plan.prompt_token_ids == [1, 3, 3, 3, 3, *words(checkpoint, " hi")]
    item = plan.items[0]
    assert (item.modality, item.height, item.width, item.offset, item.length) == ("image", 30, 40, 1, 4)
    assert item.digest == hashlib.sha256(checkpoint.fingerprint.digest + garbage).digest()
    assert [(t.name, t.dtype, t.shape) for t in item.tensors] == [("pixel_values", "uint8", (3, 28, 28))]
    assert not executor.requests


async def test_plan_of_a_header(client: AsyncClient) -> None:
    plan = await client.plan(Prompt("<image>", [Media.header(encoded(picture(), "BMP")[:64], 4000)]))
    assert plan.items[0].digest is None
    with pytest.raises(RequestError) as caught:
        await client.plan(Prompt("<image>", [Media.header(PNG[:12], len(PNG))]))
    assert caught.value.code == "INVALID_ARGUMENT"
    assert 12 < int(caught.value.details["bytes_needed"]) <= len(PNG)


async def test_tokenize_and_detokenize(client: AsyncClient, checkpoint: Checkpoint) -> None:
    ids = await client.tokenize("Größe <image>")
    assert ids == checkpoint.tokenizer.encode("Größe <image>")
    assert await client.tokenize("Größe", add_special_tokens=False) == words(checkpoint, "Größe")
    assert await client.detokenize(ids) == "Größe "
    assert await client.detokenize(ids, skip_special_tokens=False) == "<s>Größe <image>"
    with pytest.raises(RequestError, match="ids are below 600"):
        await client.detokenize([600])


async def test_large_requests_are_worked_on_beside_the_loop(client: AsyncClient, checkpoint: Checkpoint) -> None:
    text = "some words " * 20_000
    assert await client.tokenize(text) == checkpoint.tokenizer.encode(text)
    with pytest.raises(RequestError, match="at most 511 fit"):
        await client.plan(Prompt(text))


async def test_list_models(client: AsyncClient, checkpoint: Checkpoint) -> None:
    (model,) = await client.list_models()
    assert (model.name, model.architecture) == ("tiny-llava", "LlavaForConditionalGeneration")
    assert model.placeholders == {"image": "<image>"}
    assert (model.max_model_len, model.max_items_per_prompt) == (512, {"image": 4})
    assert (model.num_ready_executors, model.fingerprint) == (1, checkpoint.fingerprint.digest)


async def test_health(client: AsyncClient) -> None:
    assert await client.health() == "SERVING"
    assert await client.health(SERVICE_NAME) == "SERVING"


async def test_draining_lets_running_requests_end(checkpoint_dir: Path, checkpoint: Checkpoint) -> None:
    executor = StandInExecutor(checkpoint.fingerprint)
    executor.delay = 0.02
    await executor.start()
    settings = PreprocessSettings(model=checkpoint_dir, port=0, executor=executor.address)
    async with running(PreprocessServer(settings), grace=5.0) as server, AsyncClient(server.address) as client:
        running_request = asyncio.create_task(client.generate(Prompt("a few words to say")))
        await eventually(lambda: bool(executor.requests))
        drain = asyncio.create_task(server.drain(5.0))
        await asyncio.sleep(0.01)
        assert await client.health(SERVICE_NAME) == "NOT_SERVING"
        assert (await failure(client, Prompt("too late"))).code == "UNAVAILABLE"
        assert (await running_request).text == "a few words to say"
        await drain
    await executor.stop()
