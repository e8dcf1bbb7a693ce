"""The executor as a service on a GPU: the demo model's answers, two on one GPU, and a GPU that fails."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from diptych.client import Client
from diptych.service.lifecycle import CHANNEL_OPTIONS
from executor_service.server import ExecutorServer
from executor_service.settings import ExecutorSettings
from registry import MediaLimits
from registry.families import open_family
from registry.fingerprint import fingerprint
from tests.conftest import DEMO_MODEL
from tests.executor_service.peer import Peer, Planner, model_facts
from tests.integration.test_demo_model import AT_ONCE, QUESTIONS, REFERENCE, ask
from tests.services import service_thread, stack

pytestmark = pytest.mark.gpu

ON_GPU: dict[str, Any] = {
    "device": "cuda", "dtype": "float32", "gpu_memory_utilization": 0.2, "max_num_seqs": 32, "block_size": 64,
}  # fmt: skip
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def planner(checkpoint: Path) -> Planner:
    family = open_family(checkpoint, MediaLimits({"image": 4}))
    return Planner(family, fingerprint(family).digest)


@pytest.mark.parametrize(("dtype", "decoder"), [("float32", "fused"), ("float32", "stock"), ("bfloat16", "fused")])
def test_the_demo_model_sees_what_its_card_says(dtype: str, decoder: str) -> None:
    """Two hundred held-out questions through both services; in bfloat16 a few answers may be others."""
    executor = {**ON_GPU, "dtype": dtype, "decoder": decoder, "block_size": 16, "kv_cache_memory": "256MiB"}
    with stack(DEMO_MODEL, executor=executor) as services:
        with Client(services.preprocess_address) as client, ThreadPoolExecutor(AT_ONCE) as pool:
            said = list(pool.map(lambda question: ask(client, question), QUESTIONS))
        services.check_idle()
    right = sum(answers == question.truth for answers, question in zip(said, QUESTIONS, strict=True))
    reference = sum(REFERENCE["said"][question.number] == question.truth for question in QUESTIONS)
    agreeing = sum(answers == reference for answers, reference in zip(said, REFERENCE["said"], strict=True))
    print(f"{dtype}, {decoder}: {right} of {len(said)} right, {agreeing} as transformers on a CPU")
    most = 1 if dtype == "float32" else 4
    assert abs(right - reference) <= most
    assert agreeing >= len(said) - 2 * most


def test_two_executors_share_a_gpu(checkpoint: Path, planner: Planner) -> None:
    """Each keeps to its share, whoever was first; both answer the same at the same time."""
    settings = ExecutorSettings(model=checkpoint, port=0, limit_mm_per_prompt={"image": 4}, **ON_GPU)
    with (
        service_thread(lambda: ExecutorServer(settings)) as (first, _),
        service_thread(lambda: ExecutorServer(settings)) as (second, _),
        grpc.insecure_channel(first.address, options=CHANNEL_OPTIONS) as one,
        grpc.insecure_channel(second.address, options=CHANNEL_OPTIONS) as other,
    ):
        blocks = [server.front.booted.ledger.num_blocks for server in (first, second)]
        assert blocks[1] == pytest.approx(blocks[0], rel=0.05)
        planned = [planner.plan("Look: <image> so?" + " what" * n, max_tokens=30) for n in range(8)]
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda channel: ask_all(channel, planned), (one, other)))
        assert answers[0] == answers[1]
        assert all(len(tokens) == 30 for tokens in answers[0])
        assert model_facts(one).architecture == "LlavaForConditionalGeneration"


def ask_all(channel: grpc.Channel, planned: list[Any]) -> list[list[int]]:
    """Every request's tokens, all on one stream."""
    with Peer(channel) as peer:
        return [peer.run(handle, one).tokens for handle, one in enumerate(planned, 1)]


@contextlib.contextmanager
def failing_executor(checkpoint: Path) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """The process, its address, and its log lines, which a thread collects."""
    flags = ["--model", str(checkpoint), "--port", "0", "--device", "cuda", "--gpu-memory-utilization", "0.2",
             "--limit-mm-per-prompt", "image=4", "--max-num-seqs", "16", "--kv-cache-memory", "64MiB"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.executor_service.failing_executor",
         "tests.executor_service.gpu.failing_engine", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    log: list[str] = []
    reader = threading.Thread(target=lambda: log.extend(process.stderr or ()), daemon=True)
    reader.start()
    try:
        yield process, process.stdout.readline().removeprefix("listening on ").strip(), log
    finally:
        process.kill()
        process.wait()
        reader.join(10)
        process.stdout.close()
        process.stderr.close()


@contextlib.contextmanager
def watching(channel: grpc.Channel) -> Iterator[tuple[list[int], threading.Thread]]:
    """What health says, SERVING first, until its stream ends; a thread reads it.

    As it comes: what nobody has read by the end of the connection may be lost.
    """
    request = health_pb2.HealthCheckRequest(service="diptych.v1.ExecutorService")
    watched = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=120)
    said = [next(watched).status]
    assert said == [SERVING]

    def read() -> None:
        with contextlib.suppress(grpc.RpcError):
            said.extend(response.status for response in watched)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield said, reader
    finally:
        watched.cancel()
        reader.join(30)


def test_a_gpu_that_fails_ends_every_request_and_the_process(checkpoint: Path, planner: Planner) -> None:
    """Health says so before the process goes: it gives streams, of which the watch is one, a second to end."""
    with (
        failing_executor(checkpoint) as (process, address, log),
        grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as channel,
        watching(channel) as (said, reader),
    ):
        with Peer(channel, timeout=60) as peer:
            waiting, running = planner.plan(), planner.plan("go", sizes=(), max_tokens=1500)
            peer.start(1, waiting)
            peer.wait_credit(1)
            peer.start(2, running)
            for handle in (1, 2):
                answer = peer.finish(handle)
                assert answer.code is grpc.StatusCode.UNAVAILABLE
                assert "CUDA" in answer.status.message or "device-side assert" in answer.status.message
            assert 0 < len(peer.answers[2].tokens) < 1500
        assert process.wait(30) == 1
        reader.join(30)
        assert not reader.is_alive()
        assert said == [SERVING, NOT_SERVING]
    assert any("device-side assert" in line for line in log)
