"""Services that would disagree refuse each other, and say on what."""

from __future__ import annotations

import time
from pathlib import Path

import grpc
import pytest

from diptych.service.errors import IncompatibleError
from diptych.v1 import executor_pb2, executor_pb2_grpc, preprocess_pb2_grpc
from executor_service.server import ExecutorServer
from executor_service.settings import ExecutorSettings
from preprocess_service.server import PreprocessServer
from preprocess_service.settings import PreprocessSettings
from registry.families import open_family
from registry.fingerprint import fingerprint
from tests.checkpoints import make_llava_checkpoint, processor_config, write_json, write_tokenizer
from tests.executor_service.peer import Peer, Planner
from tests.integration.conftest import picture_bytes, prompt_request
from tests.integration.test_bad_input import failure
from tests.services import service_thread


def make_variant(path: Path, kind: str) -> Path:
    """The usual checkpoint but for one thing."""
    make_llava_checkpoint(path, **({"image_size": 84} if kind == "counts" else {}))
    if kind == "pixels":
        write_json(path / "preprocessor_config.json", processor_config("clip", 56, resample=2))
    if kind == "tokenizer":
        write_tokenizer(path, 310)
    return path


DIFFERENCES = {"pixels": "input mapper", "counts": "input mapper, item layout", "tokenizer": "tokenizer"}


@pytest.fixture(scope="module")
def executor(tmp_path_factory):
    """An executor that serves the usual checkpoint."""
    settings = ExecutorSettings(model=make_variant(tmp_path_factory.mktemp("usual"), "usual"), port=0)
    with service_thread(lambda: ExecutorServer(settings)) as (server, _):
        yield server


@pytest.mark.parametrize("kind", DIFFERENCES)
def test_a_preprocess_service_refuses_the_executor_at_boot(executor, tmp_path, kind: str) -> None:
    settings = PreprocessSettings(model=make_variant(tmp_path, kind), port=0, executor=executor.address)
    with pytest.raises(IncompatibleError) as caught, service_thread(lambda: PreprocessServer(settings)):
        pass
    assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION
    assert caught.value.message == (
        f"the executor {executor.address} would disagree with this service on: {DIFFERENCES[kind]}"
    )


@pytest.mark.parametrize("kind", DIFFERENCES)
def test_the_executor_refuses_the_start(executor, tmp_path, kind: str) -> None:
    theirs = fingerprint(open_family(make_variant(tmp_path, kind))).digest
    with grpc.insecure_channel(executor.address) as channel, Peer(channel) as peer:
        peer.start(1, Planner(executor.front.family, theirs).plan())
        answer = peer.finish(1)
        assert (answer.code, answer.facts["stage"]) == (grpc.StatusCode.FAILED_PRECONDITION, "handshake")
        assert theirs.hex() in answer.status.message
        ours = executor_pb2_grpc.ExecutorServiceStub(channel).GetModel(executor_pb2.GetModelRequest()).fingerprint
        assert ours.digest.hex() in answer.status.message


def test_an_executor_that_comes_back_as_another_is_refused(tmp_path) -> None:
    """A client is told what differs, not only that nobody is there."""
    usual, other = make_variant(tmp_path / "usual", "usual"), make_variant(tmp_path / "other", "counts")
    with service_thread(lambda: ExecutorServer(ExecutorSettings(model=usual, port=0))) as (first, _):
        port = int(first.address.rpartition(":")[2])
        settings = PreprocessSettings(model=usual, port=0, executor=first.address)
        preprocess = service_thread(lambda: PreprocessServer(settings))
        server, _ = preprocess.__enter__()
    try:
        again = ExecutorSettings(model=other, port=port)
        with (
            service_thread(lambda: ExecutorServer(again)),
            grpc.insecure_channel(server.address) as channel,
        ):
            stub = preprocess_pb2_grpc.PreprocessServiceStub(channel)
            request = prompt_request("<image>", [picture_bytes(1)])
            until, status = time.monotonic() + 20, "UNAVAILABLE"
            while status == "UNAVAILABLE" and time.monotonic() < until:
                status, message, facts = failure(lambda: list(stub.Generate(request)))
                time.sleep(0.1)
            assert (status, facts["differences"]) == ("FAILED_PRECONDITION", "input mapper, item layout")
            assert "would disagree with this service on: input mapper, item layout" in message
    finally:
        preprocess.__exit__(None, None, None)
