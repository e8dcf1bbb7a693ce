"""An engine that fails by an exception nobody expected says which, to whoever waits, and its process ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from diptych.service.errors import UnavailableError
from diptych.service.lifecycle import CHANNEL_OPTIONS
from executor_service.engine.kv_cache import KVCacheTooSmallError
from executor_service.engine.messages import EngineConfig
from executor_service.engine.process import _boot_error
from executor_service.front.arena import Arena
from executor_service.front.engine_link import EngineLink
from executor_service.kernels.cuda.code import KernelLoadError
from registry import MediaLimits
from registry.errors import CheckpointError, MissingHookError
from registry.families import open_family
from registry.fingerprint import fingerprint
from tests.executor_service.failing_engine import FAILURE, REASON
from tests.executor_service.peer import Peer, Planner

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
PATIENCE = 60
"""Seconds for what takes a moment; whoever waits for a thread that reads weights waits longer."""


@pytest.mark.parametrize(
    ("failure", "message"),
    [("boot", f"ValueError: {REASON}"), ("load", f"KeyError: '{REASON}'"), ("checkpoint", REASON)],
)
async def test_a_boot_that_fails_ends_the_process(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, failure: str, message: str
) -> None:
    """Though threads that read weights wait, and would for ever; nobody kills it."""
    monkeypatch.setenv(FAILURE, failure)
    arena = Arena(1 << 20)
    link = EngineLink(*(lambda _: None,) * 3, engine_module="tests.executor_service.failing_engine")
    link.launch(EngineConfig(checkpoint, device="cpu"), arena)
    assert link.died is not None
    try:
        with pytest.raises(UnavailableError) as caught:
            await asyncio.wait_for(link.wait_booted(), PATIENCE)
        assert str(caught.value) == message
        assert await asyncio.wait_for(link.died, PATIENCE) == "the engine process ended with exit code 1"
    finally:
        await link.stop()
        arena.close()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (CheckpointError("lower --max-model-len"), "lower --max-model-len"),
        (MissingHookError("no layout"), "no layout"),
        (KVCacheTooSmallError("no room"), "no room"),
        (KernelLoadError("silu_mul does not load"), "silu_mul does not load"),
        (TypeError("Model lacks the method forward"), "Model lacks the method forward"),
        (ImportError("torch is not installed"), "torch is not installed"),
        (RuntimeError("a kernel could not be launched"), "a kernel could not be launched"),
        (ValueError("no number"), "ValueError: no number"),
        (KeyError("rope"), "KeyError: 'rope'"),
        (AssertionError(), "AssertionError: "),
        (NotImplementedError(), "NotImplementedError: "),
        (FileNotFoundError(2, "No such file", "x"), "FileNotFoundError: [Errno 2] No such file: 'x'"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_only_what_is_raised_on_purpose_speaks_for_itself(error: Exception, message: str) -> None:
    assert _boot_error(error) == message


@contextlib.contextmanager
def failing_executor(checkpoint: Path, failure: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.executor_service.failing_executor", "tests.executor_service.failing_engine",
         "--model", str(checkpoint), "--port", "0",
         "--device", "cpu", "--limit-mm-per-prompt", "image=4"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, FAILURE: failure},
        start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # an engine that does not end holds the pipes
        process.communicate()


def test_whoever_gives_the_command_reads_why_it_does_not_boot(checkpoint: Path) -> None:
    with failing_executor(checkpoint, "boot") as process:
        output, errors = process.communicate(timeout=PATIENCE)
        assert (output, process.returncode) == ("", 1)
        assert f"UNAVAILABLE: ValueError: {REASON}\n" in errors


def test_a_step_that_raises_ends_every_request_and_the_process(checkpoint: Path) -> None:
    """One that waits for its tensors and two that run: all hear why, in a line; the log has the rest."""
    family = open_family(checkpoint, MediaLimits({"image": 4}))
    planner = Planner(family, fingerprint(family).digest)
    with failing_executor(checkpoint, "step") as process:
        assert process.stdout is not None
        address = process.stdout.readline().removeprefix("listening on ").strip()
        with grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
            service = health_pb2.HealthCheckRequest(service="diptych.v1.ExecutorService")
            watched = health_pb2_grpc.HealthStub(channel).Watch(service, timeout=PATIENCE)
            assert next(watched).status == SERVING
            with Peer(channel, timeout=PATIENCE) as peer:
                peer.start(1, planner.plan())
                peer.wait_credit(1)
                for handle in (2, 3):
                    peer.start(handle, planner.plan("go", sizes=(), max_tokens=1500))
                answers = [peer.finish(handle) for handle in (1, 2, 3)]
            for answer in answers:
                assert answer.code is grpc.StatusCode.UNAVAILABLE
                expected = f"the engine process ended with exit code 1: FloatingPointError: {REASON}"
                assert answer.status.message == expected
                assert len(answer.finals) == 1
            assert [len(answer.tokens) > 0 for answer in answers] == [False, True, True]
            assert next(watched).status == NOT_SERVING
        errors = process.communicate(timeout=PATIENCE)[1]
        assert process.returncode == 1
        assert f"FloatingPointError: {REASON}\nand this is for the log alone" in errors
