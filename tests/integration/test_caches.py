"""Through both services: the second turn about a picture sends no pixels and runs no encoder."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from diptych.v1 import preprocess_pb2, tensor_pb2
from tests.integration.conftest import media, picture_bytes, prompt_request
from tests.integration.test_tokens import collect
from tests.services import Stack


def counts(served: Stack) -> dict[str, int]:
    """What engine and reception have done so far."""

    async def values() -> dict[str, int]:
        front = served.executor.front
        return {**vars(front.counters), **vars(front.reception_counters)}

    return asyncio.run_coroutine_threadsafe(values(), served.executor_loop).result(10)


def chat_request(turns: list[tuple[str, str]], picture: bytes, max_tokens: int = 12) -> preprocess_pb2.GenerateRequest:
    """A conversation about one picture; the last turn waits for its answer."""
    messages = []
    for index, (role, text) in enumerate(turns):
        parts = [preprocess_pb2.ChatPart(text=text)]
        if index == 0:
            parts.insert(0, preprocess_pb2.ChatPart(media=media(picture)))
        messages.append(preprocess_pb2.ChatMessage(role=role, parts=parts))
    sampling = tensor_pb2.SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    return preprocess_pb2.GenerateRequest(chat=preprocess_pb2.Chat(messages=messages), sampling=sampling)


def test_the_second_turn_sends_no_pixels_and_runs_no_encoder(served, reference) -> None:
    picture = picture_bytes(7001)
    first_turn = [("user", "What is this, and what might it be good for?")]
    _, answer, first = collect(served.stub, chat_request(first_turn, picture))
    before = counts(served)
    second_turn = [*first_turn, ("assistant", answer), ("user", "Are you sure about that?")]
    tokens, _, second = collect(served.stub, chat_request(second_turn, picture))
    after = counts(served)
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens >= first.usage.prompt_tokens // 16 * 16 - 16 > 16
    assert after["num_received_bytes"] == before["num_received_bytes"]
    assert after["num_encoded_items"] == before["num_encoded_items"]
    # With another picture in front, nothing of it is found, and the answer is another.
    others, _, fresh = collect(served.stub, chat_request(second_turn, picture_bytes(7002)))
    assert fresh.usage.cached_tokens < 16
    assert others != tokens


def test_tokens_stay_those_of_generate_when_everything_is_cached(served, reference) -> None:
    cases = [(f"{'so ' * (n % 3)}<image> what, and <image>?", [picture_bytes(7100 + n % 2), picture_bytes(7103)], 9)
             for n in range(12)]  # fmt: skip
    expected = {case[0] + str(n % 2): reference.generate(*case) for n, case in enumerate(cases[:6])}
    before = counts(served)
    with ThreadPoolExecutor(6) as pool:
        requests = [prompt_request(text, pictures, max_tokens=length) for text, pictures, length in cases]
        answers = list(pool.map(lambda request: collect(served.stub, request), requests))
    for n, ((text, _, _), (tokens, _, _)) in enumerate(zip(cases, answers, strict=True)):
        assert tokens == expected[text + str(n % 2)]
    assert counts(served)["num_encoded_items"] - before["num_encoded_items"] <= 3


@pytest.mark.parametrize("text", ["<image>", "<image><image>"])
def test_the_same_picture_twice_is_sent_once(served, reference, text: str) -> None:
    picture = picture_bytes(7200 + len(text))
    before = counts(served)
    tokens, _, _ = collect(served.stub, prompt_request(text, [picture] * text.count("<image>")))
    assert tokens == reference.generate(text, [picture] * text.count("<image>"), 10)
    assert counts(served)["num_received_bytes"] - before["num_received_bytes"] == 3 * 56 * 56
