"""Several answers to one request, priorities, and the tensors alone: through the real services."""

from __future__ import annotations

import asyncio
import io

import grpc
import numpy as np
import pytest
from PIL import Image

from diptych.client import AsyncClient, Chat, Client, Media, Message, Prompt, RequestError
from diptych.v1 import preprocess_pb2
from registry import MediaInfo, MediaItem
from tests.integration.conftest import picture_bytes, prompt_request
from tests.integration.test_caches import counts

TEXT = "What about <image>, then?"


@pytest.fixture
def client(served):
    with Client(served.preprocess_address, timeout=120) as client:
        yield client


def prompt(seed: int) -> Prompt:
    return Prompt(TEXT, [Media(picture_bytes(seed))])


def test_answers_have_seeds_of_their_own_and_share_the_prompt(client: Client, served) -> None:
    options = {"max_tokens": 12, "temperature": 1.0, "ignore_eos": True}
    alone = [client.generate(prompt(9001), seed=40 + index, **options).token_ids for index in range(4)]
    before = counts(served)
    together = client.generate_all(prompt(9002), seed=40, n=4, **options)
    after = counts(served)
    assert len({tuple(answer.token_ids) for answer in together}) == 4
    assert [answer.final.usage.completion_tokens for answer in together] == [12] * 4
    assert after["num_encoded_items"] - before["num_encoded_items"] == 1
    assert after["num_received_items"] - before["num_received_items"] == 1
    length = together[0].final.usage.prompt_tokens
    assert [answer.final.usage.cached_tokens for answer in together[1:]] == [(length - 1) // 16 * 16] * 3
    again = client.generate_all(prompt(9001), seed=40, n=4, **options)
    assert [answer.token_ids for answer in again] == alone


def test_greedy_answers_are_equal_and_the_prompt_is_scored_once(client: Client) -> None:
    answers = client.generate_all(prompt(9003), n=3, max_tokens=5, temperature=0, prompt_logprobs=1, logprobs=1)
    assert answers[0].token_ids == answers[1].token_ids == answers[2].token_ids
    assert len(answers[0].prompt_logprobs) == answers[0].final.usage.prompt_tokens - 1
    assert [len(answer.prompt_logprobs) for answer in answers[1:]] == [0, 0]
    assert [len(answer.logprobs) for answer in answers] == [5] * 3


def test_async_client(served) -> None:
    async def run():
        async with AsyncClient(served.preprocess_address, timeout=60) as client:
            return await client.generate_all(prompt(9004), n=2, max_tokens=3), await client.process(prompt(9004))

    answers, processed = asyncio.run(run())
    assert len(answers) == 2
    assert len(processed.tensors[0]["pixel_values"]) == 3 * 56 * 56


@pytest.mark.parametrize("n", [0, 129])
def test_n_out_of_range(client: Client, n: int) -> None:
    with pytest.raises(RequestError, match=f"n is {n}; it must be at least 1 and at most 128") as caught:
        client.generate(prompt(1), n=n)
    assert caught.value.code == "INVALID_ARGUMENT"


def test_one_bad_picture_ends_all_answers_with_one_error(served) -> None:
    broken = picture_bytes(9005)[:-300]
    request = prompt_request(TEXT, [broken])
    request.n = 4
    with pytest.raises(grpc.RpcError) as caught:
        collect_all(served.stub, request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    served.check_idle()


def collect_all(stub, request) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    for response in stub.Generate(request, timeout=60):
        tokens.setdefault(response.index, []).extend(response.token_ids)
    return tokens


def test_cancelling_cancels_every_answer(served) -> None:
    request = prompt_request("no picture", [], max_tokens=1500)
    request.n = 6
    call = served.stub.Generate(request, timeout=60)
    seen = set()
    for response in call:
        seen.add(response.index)
        if len(seen) == 6:
            break
    call.cancel()
    served.check_idle()


def test_stop_strings_end_each_answer_by_itself(client: Client) -> None:
    answers = client.generate_all(prompt(9006), n=3, seed=1, temperature=1.5, max_tokens=40, ignore_eos=True)
    letter = next(c for c in answers[1].text if c.isalpha())
    stopped = client.generate_all(
        prompt(9006), n=3, seed=1, temperature=1.5, max_tokens=40, ignore_eos=True, stop=[letter]
    )
    assert [answer.text for answer in stopped] == [answer.text.split(letter)[0] for answer in answers]


# --- Process ------------------------------------------------------------------------------------------


def test_process_gives_the_mappers_tensors(client: Client, served) -> None:
    family = served.executor.front.family
    pictures = [picture_bytes(seed, 40 + seed % 50, 70) for seed in (9101, 9102)]
    chat = Chat([Message("user", ["Compare", Media(pictures[0]), "with", Media(pictures[1])])])
    processed = client.process(chat)
    assert processed.plan == client.plan(chat)
    for index, item in enumerate(processed.plan.items):
        with Image.open(io.BytesIO(pictures[index])) as picture:
            expected = family.map_item(
                MediaItem(MediaInfo.image(picture.height, picture.width), picture.convert("RGB"))
            )
        (described,) = item.tensors
        array = np.frombuffer(processed.tensors[index][described.name], described.dtype).reshape(described.shape)
        np.testing.assert_array_equal(array, expected[described.name])


def test_process_pieces_come_in_order_and_bounded(served) -> None:
    prompt_message = preprocess_pb2.Prompt(text="<image>" * 3, media=prompt_request("", [
        picture_bytes(seed, 300, 200) for seed in range(3)]).prompt.media)  # fmt: skip
    responses = list(served.stub.Process(preprocess_pb2.ProcessRequest(prompt=prompt_message), timeout=60))
    assert responses[0].HasField("plan")
    received = dict.fromkeys(range(3), 0)
    for response in responses[1:]:
        chunk = response.chunk
        assert chunk.offset == received[chunk.item_index]
        assert 1 <= len(chunk.data) <= 1 << 20
        received[chunk.item_index] += len(chunk.data)
    assert received == dict.fromkeys(range(3), 3 * 56 * 56)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ({"data": b"no picture at all"}, "item 0"),
        ({"data": picture_bytes(1)[:-200]}, "item 0"),
        ({"header": preprocess_pb2.MediaHeader(prefix=picture_bytes(1)[:100], total_bytes=5000)}, "only a header"),
    ],
)
def test_process_refuses_what_generate_refuses(served, source: dict, text: str) -> None:
    item = preprocess_pb2.Media(modality=1, **source)
    request = preprocess_pb2.ProcessRequest(prompt=preprocess_pb2.Prompt(text="<image>", media=[item]))
    with pytest.raises(grpc.RpcError, match=text) as caught:
        list(served.stub.Process(request, timeout=60))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
