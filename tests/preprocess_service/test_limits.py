"""What is too large is refused before any work; and the largest that is not keeps nobody else waiting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import pytest
import pytest_asyncio

from diptych.client import AsyncClient, Chat, Media, Message, Prompt, RequestError
from diptych.service.lifecycle import running
from preprocess_service import limits
from preprocess_service.planning import Checkpoint
from preprocess_service.server import PreprocessServer
from preprocess_service.settings import PreprocessSettings
from tests.stand_in_executor import StandInExecutor
from tests.tiny_checkpoint import encoded, picture

MAX_BYTES = limits.DEFAULT_MAX_PROMPT_BYTES
NOTICEABLE = 1.0
"""Seconds; a request that holds the interpreter stops everything for nearly as long as it takes itself."""


@pytest_asyncio.fixture(scope="module")
async def roomy(checkpoint_dir: Path, checkpoint: Checkpoint) -> AsyncIterator[AsyncClient]:
    """A service whose executor takes prompts of any length."""
    executor = StandInExecutor(checkpoint.fingerprint, max_model_len=1 << 24)
    executor.script = lambda start: [5]
    await executor.start()
    settings = PreprocessSettings(model=checkpoint_dir, port=0, executor=executor.address)
    async with running(PreprocessServer(settings)) as server, AsyncClient(server.address) as client:
        yield client
    await executor.stop()


async def failure(call: Awaitable[object]) -> RequestError:
    with pytest.raises(RequestError) as caught:
        await call
    return caught.value


def say(text: str = "", role: str = "user") -> Message:
    return Message(role, [text] if text else [])


PNG = Media(encoded(picture()))
TOO_LARGE = {
    "prompt": (Prompt("a" * (MAX_BYTES + 1)), MAX_BYTES, MAX_BYTES + 1, "bytes of text"),
    "prompt in bytes, not characters": (Prompt("ö" * (MAX_BYTES // 2 + 1)), MAX_BYTES, MAX_BYTES + 2, "bytes of text"),
    "chat": (Chat([say("a" * (MAX_BYTES // 2))] * 3), MAX_BYTES, None, "bytes of text"),
    "messages": (Chat([say()] * 20_000), limits.MAX_MESSAGES, 20_000, "20000 messages"),
    "parts": (Chat([Message("user", [""] * 30_000)]), limits.MAX_PARTS, 30_000, "30000 parts"),
    "role": (Chat([say("x", "r" * 60_000)]), limits.MAX_ROLE_LENGTH, 60_000, "role of a message"),
    "items": (Prompt("<image>", [Media(b"")] * 20_000), 4, 20_000, "20000 media items"),
    "items of a chat": (Chat([Message("user", [PNG] * 1000)]), 4, 1000, "1000 media items"),
    "items of one modality": (Prompt("<image>", [PNG] * 5), 4, 5, "5 image items"),
}


@pytest.mark.parametrize("what", TOO_LARGE)
async def test_what_is_too_large_is_refused_at_once(roomy: AsyncClient, what: str) -> None:
    prompt, limit, actual, text = TOO_LARGE[what]
    for call in (roomy.generate, roomy.plan):
        error = await failure(call(prompt))
        assert (error.code, error.details["stage"]) == ("INVALID_ARGUMENT", "admit")
        assert error.details["limit"] == str(limit)
        assert actual is None or error.details["actual"] == str(actual)
        assert text in error.message


async def test_texts_and_ids_for_the_tokenizer_are_limited(roomy: AsyncClient) -> None:
    error = await failure(roomy.tokenize("a" * (MAX_BYTES + 1)))
    assert (error.details["stage"], error.details["limit"]) == ("admit", str(MAX_BYTES))
    assert "--max-prompt-bytes" in error.message
    error = await failure(roomy.detokenize([5] * (limits.MAX_DETOKENIZED + 1)))
    assert (error.details["stage"], error.details["limit"]) == ("admit", str(limits.MAX_DETOKENIZED))
    assert f"{limits.MAX_DETOKENIZED + 1} ids" in error.message


async def test_stop_strings_are_counted_first(roomy: AsyncClient) -> None:
    error = await failure(roomy.generate(Prompt("x"), stop=["a"] * 60_000))
    assert (error.details["stage"], error.details["limit"]) == ("admit", "16")


async def test_what_cannot_fit_is_refused_by_its_bytes(client: AsyncClient, checkpoint: Checkpoint) -> None:
    longest = checkpoint.tokenizer.max_bytes_per_token
    assert longest is not None
    text = "a" * (511 * longest + 1)
    for prompt in (Prompt(text), Chat([say(text)])):
        error = await failure(client.plan(prompt))
        assert (error.details["stage"], error.details["limit"]) == ("plan", "511")
        assert "bytes of text, at least" in error.message
    assert "bytes of text" not in (await failure(client.plan(Prompt("a" * 512)))).message


async def test_the_operator_sets_the_limit(checkpoint_dir: Path, checkpoint: Checkpoint) -> None:
    executor = StandInExecutor(checkpoint.fingerprint)
    await executor.start()
    settings = PreprocessSettings(model=checkpoint_dir, port=0, executor=executor.address, max_prompt_bytes="100")
    async with running(PreprocessServer(settings)) as server, AsyncClient(server.address) as client:
        assert (await client.plan(Prompt("a" * 100))).prompt_token_ids
        for call in (client.plan(Prompt("a" * 101)), client.tokenize("a" * 101)):
            assert (await failure(call)).details["limit"] == "100"
        # Before anything is done with the items.
        error = await failure(client.plan(Prompt("a" * 101, [Media(b"no picture")])))
        assert (error.details["stage"], error.details["limit"]) == ("admit", "100")
        # Within the limit as it is sent, beyond it as the template renders it.
        error = await failure(client.plan(Chat([say("x" * 10, role) for role in ("user", "assistant") * 3])))
        assert int(error.details["actual"]) > 100
    await executor.stop()


async def test_tokenizing_counts_as_work(server: PreprocessServer, client: AsyncClient) -> None:
    assert server._pipeline is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server._pipeline, "_num_pending", 8)
        for call in (client.tokenize("x"), client.detokenize([5]), client.plan(Prompt("x"))):
            assert (await failure(call)).code == "RESOURCE_EXHAUSTED"


async def check_nobody_waits(work: Awaitable[object], client: AsyncClient) -> None:
    """Somebody else's health checks, Tokenize and Generate are answered while `work` is under way.

    On a machine that is busy with other things everything is slow, so the bound grows with the work's own time.
    """
    began = time.perf_counter()
    task, slowest = asyncio.ensure_future(work), 0.0
    while not task.done():
        for call in (client.health(), client.tokenize("short"), client.generate(Prompt("short"), max_tokens=1)):
            start = time.perf_counter()
            await call
            slowest = max(slowest, time.perf_counter() - start)
        await asyncio.sleep(0.001)
    await task
    assert slowest < max(NOTICEABLE, (time.perf_counter() - began) / 3)


LARGEST = {
    "words": "some words " * (MAX_BYTES // 11),
    "no blanks": "<" * MAX_BYTES,
    "placeholders": "<image>" * (MAX_BYTES // 7),
}


@pytest.mark.parametrize("text", LARGEST)
async def test_the_largest_text_keeps_nobody_waiting(roomy: AsyncClient, text: str) -> None:
    await check_nobody_waits(roomy.tokenize(LARGEST[text]), roomy)


async def test_the_largest_prompt_keeps_nobody_waiting(roomy: AsyncClient) -> None:
    await check_nobody_waits(roomy.generate(Prompt(LARGEST["words"]), max_tokens=1), roomy)


async def test_the_largest_chat_keeps_nobody_waiting(roomy: AsyncClient) -> None:
    part = "some words " * (MAX_BYTES // 11 // limits.MAX_PARTS - 1)
    messages = [Message("user", [part] * (limits.MAX_PARTS // limits.MAX_MESSAGES))] * limits.MAX_MESSAGES
    await check_nobody_waits(roomy.generate(Chat(messages), max_tokens=1), roomy)


async def test_the_most_ids_keep_nobody_waiting(roomy: AsyncClient) -> None:
    await check_nobody_waits(roomy.detokenize([70] * limits.MAX_DETOKENIZED), roomy)
