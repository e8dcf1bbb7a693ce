"""Commands that are pointed at another server than the one they mean, and what health says of each."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest

from diptych.cli.main import main
from diptych.cli.peer import EXECUTOR, PREPROCESS
from diptych.client import Client, RequestError
from diptych.service.lifecycle import GrpcFrame
from preprocess_service.planning import Checkpoint
from preprocess_service.server import SERVICE_NAME
from tests.preprocess_service.serving import served
from tests.stand_in_executor import SERVICE_NAME as EXECUTOR_NAME
from tests.stand_in_executor import StandInExecutor, eventually
from tests.tiny_checkpoint import make_checkpoint

ASKING = {"generate": ("--prompt", "x"), "plan": ("--prompt", "x"), "models": ()}


class Said(NamedTuple):
    code: int
    output: str
    errors: str


class Commands:
    """Commands in this process, each in a thread beside the servers' loop."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    async def run(self, *arguments: str) -> Said:
        self._capsys.readouterr()
        code = await asyncio.to_thread(main, list(arguments))
        return Said(code, *self._capsys.readouterr())


@pytest.fixture
def commands(capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(capsys)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("peer") / "model")


@pytest.fixture
async def executor(model: Path) -> AsyncIterator[StandInExecutor]:
    one = StandInExecutor(Checkpoint(model).fingerprint)
    await one.start()
    yield one
    await one.stop()


@contextlib.asynccontextmanager
async def frame(name: str) -> AsyncIterator[tuple[GrpcFrame, str]]:
    """A server whose health knows a service of this name, and which has no methods."""
    one = GrpcFrame("127.0.0.1", 0, name)
    yield one, await one.start()
    await one.stop(0)


@contextlib.asynccontextmanager
async def bare_server() -> AsyncIterator[str]:
    """gRPC, and nothing that could be called."""
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


def test_the_services_have_the_names_of_the_contract() -> None:
    assert (PREPROCESS, EXECUTOR) == (SERVICE_NAME, EXECUTOR_NAME)


@pytest.mark.parametrize("command", ASKING)
async def test_an_executor_takes_no_prompts(commands: Commands, executor: StandInExecutor, command: str) -> None:
    said = await commands.run(command, "--address", executor.address, *ASKING[command])
    assert (said.code, said.output) == (1, "")
    assert said.errors.startswith(f"UNIMPLEMENTED: {executor.address} is an executor, which takes no prompts: ")
    assert f"`diptych preprocess --model DIR --executor {executor.address}`" in said.errors


async def test_another_server_is_no_preprocess_service(commands: Commands) -> None:
    async with frame("another.Service") as (_, known), bare_server() as bare:
        for address in (known, bare):
            said = await commands.run("generate", "--address", address, "--prompt", "x")
            assert (said.code, said.output) == (1, "")
            assert said.errors.startswith(f"UNIMPLEMENTED: what listens on {address} is no preprocess service (")
            assert "give the address that `diptych serve`" in said.errors


async def test_a_preprocess_service_without_the_method(commands: Commands) -> None:
    async with frame(PREPROCESS) as (_, address):
        said = await commands.run("models", "--address", address)
    assert said.errors.startswith(f"UNIMPLEMENTED: the preprocess service on {address} is of another version")


async def test_what_a_service_does_not_serve_is_its_own_word(
    commands: Commands, executor: StandInExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stream(*_: object, **__: object) -> None:
        raise RequestError("UNIMPLEMENTED", "scheme 'https' is not served", {"stage": "fetch"})

    monkeypatch.setattr(Client, "stream", stream)
    said = await commands.run("generate", "--address", executor.address, "--prompt", "x")
    assert said.errors == "UNIMPLEMENTED: scheme 'https' is not served\n  stage: fetch\n"


async def test_health_is_that_of_the_service_that_is_there(
    commands: Commands, model: Path, executor: StandInExecutor
) -> None:
    """A preprocess service whose executor has gone listens and can do nothing."""
    assert await commands.run("health", "--address", executor.address) == (0, "SERVING\n", "")
    gone = StandInExecutor(executor.fingerprint)
    async with served(model, gone) as (server, _):
        assert await commands.run("health", "--address", server.address) == (0, "SERVING\n", "")
        await gone.stop()
        assert server._executors is not None
        await eventually(lambda: not server._executors.ready)
        said = await commands.run("health", "--address", server.address)
        assert (said.code, said.output) == (1, "NOT_SERVING\n")
        assert said.errors.startswith(f"{PREPROCESS} on {server.address}: no compatible executor is ready")
        assert await commands.run("health", "--address", server.address, "--service", "") == (0, "SERVING\n", "")


async def test_an_executor_that_boots_is_not_healthy(commands: Commands) -> None:
    async with frame(EXECUTOR) as (one, address):
        said = await commands.run("health", "--address", address)
        assert (said.code, said.output) == (1, "NOT_SERVING\n")
        assert "it is still booting" in said.errors
        await one.set_serving(True)
        assert await commands.run("health", "--address", address) == (0, "SERVING\n", "")


async def test_health_of_another_server(commands: Commands) -> None:
    async with frame("another.Service") as (_, known), bare_server() as bare:
        said = await commands.run("health", "--address", known)
        assert (said.code, said.output) == (1, "")
        assert said.errors.startswith(f"NOT_FOUND: what listens on {known} is neither {PREPROCESS} nor {EXECUTOR}")
        assert (await commands.run("health", "--address", known, "--service", "")).output == "SERVING\n"
        said = await commands.run("health", "--address", bare)
        assert said.errors.startswith(f"UNIMPLEMENTED: what listens on {bare} is no service of Diptych")
