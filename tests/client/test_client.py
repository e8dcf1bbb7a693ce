"""The typed clients, synchronous and asynchronous, against a preprocess service with a stand-in executor."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from diptych.client import AsyncClient, Chat, Client, Media, Message, Prompt, RequestError
from diptych.client.inputs import generate_request
from diptych.service.lifecycle import running
from preprocess_service.planning import Checkpoint
from preprocess_service.server import SERVICE_NAME, PreprocessServer
from preprocess_service.settings import PreprocessSettings
from tests.stand_in_executor import StandInExecutor, eventually
from tests.tiny_checkpoint import encoded, make_checkpoint, picture

IMAGE = Media(encoded(picture()))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("client") / "model")


@pytest_asyncio.fixture(scope="module")
async def executor(model: Path) -> AsyncIterator[StandInExecutor]:
    one = StandInExecutor(Checkpoint(model).fingerprint)
    await one.start()
    yield one
    await one.stop()


@pytest_asyncio.fixture(scope="module")
async def address(model: Path, executor: StandInExecutor) -> AsyncIterator[str]:
    settings = PreprocessSettings(model=model, port=0, executor=executor.address)
    async with running(PreprocessServer(settings)) as server:
        yield server.address


def ask_everything(address: str, executor_address: str) -> None:
    """Every method of the synchronous client; runs in a thread, beside the services' event loop."""
    with Client(address, timeout=10) as client:
        pieces = list(client.stream(Prompt("<image>hi", [IMAGE]), max_tokens=5, logprobs=0))
        assert [piece.final is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]
        answer = client.generate(Prompt("hi there"), max_tokens=5)
        assert answer.text == client.detokenize(answer.token_ids)
        assert answer.final is not None
        assert answer.final.finish_reason == "length"
        assert answer.final.usage.completion_tokens == len(answer.token_ids)
        assert client.generate(Chat([Message("user", [IMAGE, "hi"])]), max_tokens=1).token_ids
        plan = client.plan(Prompt("<image>", [IMAGE]))
        assert plan.items[0].num_feature_tokens == 4
        assert client.tokenize("hi", add_special_tokens=False) == client.tokenize("hi")[1:]
        assert client.list_models()[0].name == "model"
        assert (client.health(), client.health(SERVICE_NAME)) == ("SERVING", "SERVING")
        with pytest.raises(RequestError) as caught:
            client.generate(Prompt("x"), model="another")
        assert caught.value.code == "NOT_FOUND"
        assert caught.value.details["model"] == "another"
        assert str(caught.value).startswith("NOT_FOUND: model 'another'")
    with Client(executor_address) as client:
        served = client.get_model()
        assert (served.name, served.dtype, served.max_model_len) == ("stand-in", "float32", 512)
        assert served.memory_ledger.num_blocks == 7


async def test_the_synchronous_client(address: str, executor: StandInExecutor) -> None:
    await asyncio.to_thread(ask_everything, address, executor.address)


async def test_the_asynchronous_client(address: str, executor: StandInExecutor) -> None:
    async with AsyncClient(address, timeout=10) as client:
        answer = await client.generate(Prompt("<image>hi", [IMAGE]), max_tokens=5)
        assert len(answer.token_ids) == 5
        assert (await client.plan(Chat([Message("user", ["hi"])]))).items == ()
    async with AsyncClient(executor.address) as client:
        assert (await client.get_model()).device == "none"


async def test_leaving_a_stream_cancels(address: str, executor: StandInExecutor) -> None:
    executor.delay = 0.02

    def leave() -> None:
        with Client(address) as client:
            stream = client.stream(Prompt("many words to say, one after another"))
            next(stream)
            stream.close()  # type: ignore[attr-defined]

    await asyncio.to_thread(leave)
    executor.delay = 0.0
    await eventually(executor.requests[-1].cancelled.is_set)


async def test_what_does_not_fit_its_field_is_refused_as_the_server_would(address: str) -> None:
    async with AsyncClient(address) as client:
        for options in ({"max_tokens": -1}, {"seed": 2**64}, {"top_k": 1.5}, {"request_id": 7}):
            with pytest.raises(RequestError) as caught:
                await client.generate(Prompt("x"), **options)  # type: ignore[arg-type]
            assert caught.value.code == "INVALID_ARGUMENT"
            assert caught.value.details["field"] in options


def test_a_single_stop_string_is_one() -> None:
    """Not as many as it has letters."""
    assert list(generate_request(Prompt("x"), {"stop": "END"}).stop) == ["END"]  # type: ignore[typeddict-item]
    assert list(generate_request(Prompt("x"), {"stop": ["A", "B"]}).stop) == ["A", "B"]


async def test_a_deadline_of_0_is_one(address: str) -> None:
    async with AsyncClient(address) as client:
        with pytest.raises(RequestError) as caught:
            await anext(client.stream(Prompt("words"), timeout=0))
    assert caught.value.code == "DEADLINE_EXCEEDED"


async def test_a_deadline_of_0_is_one_for_the_synchronous_client(address: str) -> None:
    """Also where it is the client's default: no call goes without one. (What is answered at once may be in time.)"""

    def ask() -> list[str]:
        with Client(address) as client, Client(address, timeout=0) as hasty:
            calls = (
                lambda: next(client.stream(Prompt("words"), timeout=0)),
                lambda: client.generate(Prompt("words"), timeout=0),
                lambda: next(hasty.stream(Prompt("words"))),
                lambda: hasty.generate(Prompt("words")),
                lambda: hasty.process(Prompt("words")),
                lambda: hasty.plan(Prompt("words")),
            )
            return [code_of(call) for call in calls]

    assert set(await asyncio.to_thread(ask)) == {"DEADLINE_EXCEEDED"}


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(RequestError) as caught:
        call()
    return caught.value.code


def test_both_clients_have_the_same_methods() -> None:
    def methods(cls: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(function).parameters)
            for name, function in inspect.getmembers(cls, inspect.isfunction)
            if not name.startswith("_")
        }

    assert methods(Client) == methods(AsyncClient)


def test_a_prompt_becomes_parts() -> None:
    chat = Chat.from_prompt("a <image><image> b", [IMAGE, IMAGE], "<image>")
    assert list(chat.messages[0].parts) == ["a ", IMAGE, IMAGE, " b"]
    with pytest.raises(RequestError, match="1 media placeholders and the request has 0"):
        Chat.from_prompt("<image>", [], "<image>")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        Media.file(tmp_path / "no.png")
    assert (caught.value.code, caught.value.details) == ("NOT_FOUND", {"path": str(tmp_path / "no.png")})


FILES = {
    "a.wav": (b"RIFF\0\0\0\0WAVEfmt ", "audio"),
    "no-suffix": (b"fLaC\0\0", "audio"),
    "b.ogg": (b"OggS\0", "audio"),
    "c.mp4": (b"\0\0\0\x18ftypisom", "video"),
    "d.png": (b"\0\0\0\x18ftypqt  ", "video"),
    "e.heic": (b"\0\0\0\x18ftypheic", "image"),
    "f.gif": (b"GIF89a", "image"),
    "g.jpg": (b"\xff\xd8\xff", "image"),
    "h.flac": (b"cut", "audio"),
    "i.MOV": (b"", "video"),
    "j.txt": (b"hello", "image"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_find_their_modality(tmp_path, name: str) -> None:
    data, modality = FILES[name]
    (tmp_path / name).write_bytes(data)
    assert Media.file(tmp_path / name).modality == modality
    assert Media.file(tmp_path / name, "video") == Media(data, modality="video")
