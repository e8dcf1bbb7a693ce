"""When items are decoded: ahead of the executor's question only where its answer is known, and within bounds."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from diptych.client import AsyncClient, Generation, Media, Prompt, RequestError
from preprocess_service.executor_client import executor as client_of_executor
from preprocess_service.media import decode
from preprocess_service.planning import Checkpoint
from preprocess_service.server import PreprocessServer
from tests.preprocess_service.serving import served
from tests.stand_in_executor import StandInExecutor, eventually
from tests.tiny_checkpoint import encoded, picture

SECONDS_TO_BE_SURE = 0.2


@pytest.fixture
def executor(checkpoint: Checkpoint) -> StandInExecutor:
    return StandInExecutor(checkpoint.fingerprint)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The files that were decoded."""
    files: list[bytes] = []
    real = decode.decode_image

    def noted(item: Any, index: int) -> Any:
        files.append(item.data)
        return real(item, index)

    monkeypatch.setitem(decode._DECODERS, "image", noted)  # type: ignore[arg-type]
    return files


def files(count: int) -> list[bytes]:
    return [encoded(picture(8 + index, 9)) for index in range(count)]


def ask(client: AsyncClient, *pictures: bytes) -> asyncio.Task[Generation]:
    prompt = Prompt("<image>" * len(pictures), [Media(data) for data in pictures])
    return asyncio.create_task(client.generate(prompt, max_tokens=1))


def num_early(server: PreprocessServer) -> int:
    return server._media._num_early


async def test_what_is_new_is_loaded_before_the_executor_asks(
    checkpoint_dir: Path, executor: StandInExecutor, decoded: list[bytes]
) -> None:
    executor.has_room.clear()
    (file,) = files(1)
    async with served(checkpoint_dir, executor) as (server, client):
        answer = ask(client, file)
        await eventually(lambda: decoded == [file])
        assert num_early(server) == 1
        assert not any(kind == "item_chunk" for kind, _ in executor.order), "nothing is sent unasked"
        executor.has_room.set()
        assert (await answer).token_ids
        assert executor.requests[-1].is_complete
        assert decoded == [file]
        assert num_early(server) == 0


async def test_what_was_sent_before_is_loaded_only_when_asked_for(
    checkpoint_dir: Path, executor: StandInExecutor, decoded: list[bytes]
) -> None:
    (file,) = files(1)
    async with served(checkpoint_dir, executor) as (_, client):
        await ask(client, file)
        executor.held = {executor.requests[-1].start.items[0].media_digest}
        await ask(client, file)
        assert decoded == [file], "the second turn about a picture decodes nothing"
        executor.held = set()
        await ask(client, file)
        assert decoded == [file, file], "an executor may have forgotten it"


async def test_a_lost_executor_has_seen_nothing(checkpoint_dir: Path, executor: StandInExecutor) -> None:
    (file,) = files(1)
    async with served(checkpoint_dir, executor) as (server, client):
        await ask(client, file)
        digest = executor.requests[-1].start.items[0].media_digest
        assert server._executors is not None
        (known,) = server._executors._executors
        assert known.has_seen(digest)
        await executor.stop()
        await eventually(lambda: not known.has_seen(digest))
        await executor.start()


async def test_what_an_executor_has_seen_is_bounded(
    checkpoint_dir: Path, executor: StandInExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forgotten is what was sent or found there longest ago."""
    monkeypatch.setattr(client_of_executor, "MAX_SEEN", 2)
    first, second, third = files(3)
    async with served(checkpoint_dir, executor) as (server, client):
        assert server._executors is not None
        (known,) = server._executors._executors
        for file in (first, second, first, third):
            await ask(client, file)
        digests = [request.start.items[0].media_digest for request in executor.requests]
        assert [known.has_seen(digest) for digest in digests] == [True, False, True, True]
        assert len(known._seen) == 2
        assert not known._promised, "whoever has ended promises nothing"


async def test_what_the_executor_turns_out_to_have_is_dropped(
    checkpoint_dir: Path, executor: StandInExecutor, checkpoint: Checkpoint
) -> None:
    """Another service may have sent it."""
    new, held = files(2)
    other = StandInExecutor(checkpoint.fingerprint)
    async with served(checkpoint_dir, other) as (_, client):
        await ask(client, held)
    executor.held = {other.requests[-1].start.items[0].media_digest}
    async with served(checkpoint_dir, executor) as (server, client):
        assert (await ask(client, held, new)).token_ids
        first, second = executor.requests[-1].received
        assert not any(first)
        assert all(second)
        assert num_early(server) == 0


async def test_no_more_is_loaded_ahead_than_there_are_workers(
    checkpoint_dir: Path, executor: StandInExecutor, decoded: list[bytes]
) -> None:
    """An executor without room asks for nothing, and this service's memory is not where it all waits."""
    executor.has_room.clear()
    async with served(checkpoint_dir, executor, media_threads=2) as (server, client):
        answers = [ask(client, *pair) for pair in zip(files(6)[::2], files(6)[1::2], strict=True)]
        await eventually(lambda: len(executor.requests) == 3)
        await asyncio.sleep(SECONDS_TO_BE_SURE)
        assert len(decoded) == num_early(server) == 2
        executor.has_room.set()
        assert all([(await answer).token_ids for answer in answers])
        assert sorted(decoded) == sorted(files(6))
        assert num_early(server) == 0


async def test_one_picture_twice_is_loaded_once(
    checkpoint_dir: Path, executor: StandInExecutor, decoded: list[bytes]
) -> None:
    executor.has_room.clear()
    (file,) = files(1)
    async with served(checkpoint_dir, executor, media_threads=4) as (server, client):
        answer = ask(client, file, file)
        await eventually(lambda: decoded == [file])
        await asyncio.sleep(SECONDS_TO_BE_SURE)
        assert num_early(server) == 1
        executor.has_room.set()
        await answer


async def test_what_another_request_is_about_to_send_is_not_loaded(
    checkpoint_dir: Path, executor: StandInExecutor, decoded: list[bytes]
) -> None:
    """On the stream that they share the executor asks the first alone, so the second has nothing to load."""
    executor.has_room.clear()
    (file,) = files(1)
    async with served(checkpoint_dir, executor, media_threads=4) as (server, client):
        first = ask(client, file)
        await eventually(lambda: num_early(server) == 1)
        second = ask(client, file)
        await eventually(lambda: len(executor.requests) == 2)
        await asyncio.sleep(SECONDS_TO_BE_SURE)
        assert decoded == [file]
        assert num_early(server) == 1
        first.cancel()
        await eventually(lambda: num_early(server) == 0)
        third = ask(client, file)
        await eventually(lambda: num_early(server) == 1)
        executor.has_room.set()
        assert (await second).token_ids == (await third).token_ids, "whoever is asked in the end loads it then"
        assert num_early(server) == 0


async def test_on_streams_of_their_own_both_requests_load_ahead(
    checkpoint_dir: Path, executor: StandInExecutor, decoded: list[bytes]
) -> None:
    """There the executor asks every one of them."""
    executor.has_room.clear()
    (file,) = files(1)
    async with served(checkpoint_dir, executor, media_threads=4, executor_streams="per-request") as (server, client):
        answers = [ask(client, file), ask(client, file)]
        await eventually(lambda: decoded == [file, file])
        assert num_early(server) == 2
        executor.has_room.set()
        assert all([(await answer).token_ids for answer in answers])


async def test_what_the_executor_did_not_miss_is_not_loaded_the_next_time(
    checkpoint_dir: Path, executor: StandInExecutor, decoded: list[bytes], checkpoint: Checkpoint
) -> None:
    """Another service has sent it, which this one has learnt from its first request."""
    (file,) = files(1)
    other = StandInExecutor(checkpoint.fingerprint)
    async with served(checkpoint_dir, other) as (_, client):
        await ask(client, file)
    executor.held = {other.requests[-1].start.items[0].media_digest}
    async with served(checkpoint_dir, executor) as (_, client):
        await ask(client, file)
        num_decoded = len(decoded)
        await ask(client, file)
        assert len(decoded) == num_decoded


async def test_a_cancelled_request_gives_its_places_back(checkpoint_dir: Path, executor: StandInExecutor) -> None:
    executor.has_room.clear()
    async with served(checkpoint_dir, executor, media_threads=2) as (server, client):
        answer = ask(client, *files(2))
        await eventually(lambda: num_early(server) == 2)
        answer.cancel()
        await eventually(lambda: num_early(server) == 0)
        executor.has_room.set()


async def test_a_damaged_file_ends_its_request_alone(checkpoint_dir: Path, executor: StandInExecutor) -> None:
    (file,) = files(1)
    async with served(checkpoint_dir, executor) as (server, client):
        with pytest.raises(RequestError, match="item 0") as caught:
            await ask(client, file[: len(file) // 2])
        assert caught.value.code == "INVALID_ARGUMENT"
        assert num_early(server) == 0
        assert (await ask(client, file)).token_ids


async def test_an_item_that_is_asked_for_later(
    checkpoint_dir: Path, executor: StandInExecutor, decoded: list[bytes]
) -> None:
    """It was on its way for another request, which has ended; what was asked for first must still arrive."""
    first, second = files(2)
    executor.asks_one_by_one = True
    async with served(checkpoint_dir, executor, media_threads=2) as (server, client):
        assert (await ask(client, first, second)).token_ids
        assert executor.requests[-1].is_complete
        assert set(decoded) == {first, second}
        assert num_early(server) == 0
