"""Over the wire through both services, greedy tokens are `generate()`'s, whoever else is being served."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from diptych.v1 import executor_pb2, preprocess_pb2
from tests.integration.conftest import picture_bytes, prompt_request
from tests.services import stack

FORMATS = [
    ("PNG", "RGB"),
    ("JPEG", "RGB"),
    ("PNG", "RGBA"),
    ("GIF", "P"),
    ("WEBP", "RGB"),
    ("JPEG", "CMYK"),
    ("PNG", "L"),
]


def make_case(number: int) -> tuple[str, list[bytes], int]:
    images = number % 5
    pictures = [
        picture_bytes(number * 10 + index, 30 + 11 * index, 20 + 17 * number % 90, *FORMATS[(number + index) % 7])
        for index in range(images)
    ]
    text = "tell me " * (number % 6) + " and ".join(["<image>"] * images) + " please" * (number % 4) + "?"
    return text, pictures, 5 + number % 9


def collect(stub, request) -> tuple[list[int], str, preprocess_pb2.GenerateFinal]:
    tokens, text, finals = [], "", []
    for response in stub.Generate(request, timeout=120):
        assert not finals, "a message after the final one"
        tokens += response.token_ids
        text += response.text
        if response.HasField("final"):
            finals.append(response.final)
    assert len(finals) == 1
    return tokens, text, finals[0]


@pytest.mark.parametrize("concurrency", [1, 4, 16])
def test_tokens_equal_generate(served, reference, concurrency: int) -> None:
    cases = [make_case(number) for number in range(20)]
    with ThreadPoolExecutor(concurrency) as pool:
        answers = list(pool.map(lambda c: collect(served.stub, prompt_request(c[0], c[1], max_tokens=c[2])), cases))
    for (text, pictures, length), (tokens, answer, final) in zip(cases, answers, strict=True):
        assert tokens == reference.generate(text, pictures, length)
        assert final.usage.prompt_tokens == len(reference.prompt_ids(text))
        assert final.usage.image_tokens == 16 * len(pictures)
        assert final.usage.completion_tokens == length
        decoded = reference.tokenizer.decode(tokens, skip_special_tokens=True)
        assert decoded.startswith(answer)
        assert set(decoded.removeprefix(answer)) <= {"\ufffd"}


def test_requests_leave_while_others_run(served, reference) -> None:
    text, pictures, _ = make_case(3)
    expected = reference.generate(text, pictures, 30)
    stop = threading.Event()

    def come_and_go() -> int:
        count = 0
        while not stop.is_set():
            call = served.stub.Generate(prompt_request("<image> go on", [picture_bytes(count)], max_tokens=500))
            next(call)
            call.cancel()
            count += 1
        return count

    with ThreadPoolExecutor(3) as pool:
        restless = [pool.submit(come_and_go) for _ in range(3)]
        for _ in range(3):
            assert collect(served.stub, prompt_request(text, pictures, max_tokens=30))[0] == expected
        stop.set()
        assert all(future.result() > 0 for future in restless)


@pytest.mark.parametrize("streams", ["shared", "per-request"])
def test_preemption_and_both_kinds_of_streams(checkpoint, reference, streams: str) -> None:
    """A KV cache for two long requests, eight at once."""
    settings = {"max_model_len": 160, "block_size": 4, "kv_cache_memory": 80 * 2 * 2 * 4 * 2 * 16 * 8}
    with stack(checkpoint, executor=settings, preprocess={"executor_streams": streams}) as services:
        cases = [make_case(number) for number in range(8)]
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda c: collect(services.stub, prompt_request(c[0], c[1], max_tokens=40)), cases))
        for (text, pictures, _), (tokens, _, _) in zip(cases, answers, strict=True):
            assert tokens == reference.generate(text, pictures, 40)
        services.check_idle()
        load = services.executor_stub.WatchLoad(executor_pb2.WatchLoadRequest())
        assert next(load).num_preemptions > 0
        load.cancel()


def test_seeded_sampling_does_not_depend_on_the_others(served) -> None:
    def ask(seed: int) -> list[int]:
        request = prompt_request("<image> dream", [picture_bytes(1)], temperature=1.2, top_p=0.9, seed=seed)
        return collect(served.stub, request)[0]

    alone = [ask(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(ask, range(6)))
    assert alone == together
    assert len({tuple(tokens) for tokens in alone}) > 3


def test_logprobs(served, reference) -> None:
    request = prompt_request("<image> why", [picture_bytes(2)], logprobs=3)
    entries = [entry for response in served.stub.Generate(request) for entry in response.logprobs]
    assert len(entries) == 10
    for entry in entries:
        assert entry.top[0].token_id == entry.chosen.token_id
        assert entry.chosen.logprob == pytest.approx(entry.top[0].logprob)
        assert len(entry.top) == 3


def test_stop_strings_cut_text_tokens_and_work(served, reference) -> None:
    request = prompt_request("stop me", [], max_tokens=40)
    tokens, text, _ = collect(served.stub, request)
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    cut_tokens, cut_text, final = collect(served.stub, prompt_request("stop me", [], stop=(stop,), max_tokens=40))
    assert cut_text == text[: text.index(stop)]
    assert final.stop == stop
    decode = reference.tokenizer.decode
    completing = next(n for n in range(1, len(tokens) + 1) if stop in decode(tokens[:n], skip_special_tokens=True))
    assert cut_tokens == tokens[:completing]
    assert completing < len(tokens)
    assert final.usage.completion_tokens == len(cut_tokens)
    assert final.usage.cached_tokens == (final.usage.prompt_tokens - 1) // 16 * 16
    assert final.times.HasField("prefill_seconds")
    assert final.times.HasField("generate_seconds")


def test_stop_token_ids_and_eos(served) -> None:
    tokens, _, _ = collect(served.stub, prompt_request("halt", [], max_tokens=20))
    stop = tokens[5]
    cut, _, final = collect(served.stub, prompt_request("halt", [], max_tokens=20, stop_token_ids=[stop]))
    assert cut == tokens[: tokens.index(stop) + 1]
    assert final.finish_reason == 1


def test_chat_equals_the_rendered_prompt(served) -> None:
    """Media parts stand for items; `<image>` in somebody's text is text."""
    parts = [
        preprocess_pb2.ChatPart(media=prompt_request("", [picture_bytes(4)]).prompt.media[0]),
        preprocess_pb2.ChatPart(text="what does <image> mean"),
    ]
    chat = preprocess_pb2.Chat(messages=[preprocess_pb2.ChatMessage(role="user", parts=parts)])
    request = preprocess_pb2.GenerateRequest(chat=chat, sampling=prompt_request("", []).sampling)
    tokens, _, final = collect(served.stub, request)
    assert len(tokens) == 10
    assert final.usage.image_tokens == 16


def test_deadline_names_the_stage(served) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(served.stub.Generate(prompt_request("long", [], max_tokens=1500), timeout=0.5))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
