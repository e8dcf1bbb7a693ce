"""Boot that cannot work says why; an engine that dies takes nobody along silently."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import re
import signal
import socket
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from diptych.service.errors import UnavailableError
from diptych.service.lifecycle import CHANNEL_OPTIONS
from executor_service.engine.loop import EngineLoop
from executor_service.engine.messages import (
    Abort,
    Announce,
    Complete,
    FinishReason,
    SamplingParams,
    StepEnd,
    StepTokens,
    Submit,
    ToEngine,
)
from executor_service.server import ExecutorServer
from executor_service.settings import ExecutorSettings
from registry.errors import CheckpointError
from tests.checkpoints import make_llava_checkpoint
from tests.executor_service.commands import Command, booting, health, planner_of
from tests.executor_service.conftest import boot_engine
from tests.executor_service.peer import Peer, Planner, model_facts
from tests.services import service_thread


def boot_error(checkpoint: Path, **settings: object) -> str:
    server = ExecutorSettings(model=checkpoint, port=0, **settings)
    with pytest.raises(UnavailableError) as caught, service_thread(lambda: ExecutorServer(server)):
        pass
    return str(caught.value)


def test_too_little_memory_says_what_to_lower_and_to_what(checkpoint) -> None:
    """One block of 16 tokens takes 2 x 2 layers x 2 heads x 16 x 16 floats."""
    block = 2 * 2 * 16 * 2 * 16 * 4
    message = boot_error(checkpoint, kv_cache_memory=10 * block, max_model_len=320)
    assert "room for 10 blocks of 16 tokens" in message
    assert "needs 20" in message
    assert "lower --max-model-len to 160" in message
    assert f"raise --kv-cache-memory to {20 * block}" in message
    with service_thread(
        lambda: ExecutorServer(
            ExecutorSettings(model=checkpoint, port=0, kv_cache_memory=10 * block, max_model_len=160)
        )
    ) as (server, _):
        assert server.front.booted.ledger.num_blocks == 10


def test_no_room_for_one_item(checkpoint) -> None:
    assert "raise --max-model-len above 16" in boot_error(checkpoint, max_model_len=16)


def test_more_than_the_models_positions(checkpoint) -> None:
    assert "longer than the model's 2048 positions" in boot_error(checkpoint, max_model_len=4096)


def test_a_device_that_is_not_there(checkpoint) -> None:
    assert "use --device cpu" in boot_error(checkpoint, device="cuda")


def test_weights_that_are_missing_or_misshapen(tmp_path) -> None:
    checkpoint = make_llava_checkpoint(tmp_path / "model")
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] += 1
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert "the checkpoint lacks weights: " in boot_error(checkpoint)
    config["text_config"]["num_hidden_layers"] -= 1
    config["text_config"]["intermediate_size"] += 2
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert re.search(r"weight .*mlp.* has shape \[.*\], the configuration asks for", boot_error(checkpoint))
    (checkpoint / "model.safetensors").unlink()
    assert "lacks model.safetensors" in boot_error(checkpoint)


def test_not_a_checkpoint(tmp_path) -> None:
    assert "has no config.json" in boot_error(tmp_path)


def test_a_taken_port(checkpoint) -> None:
    """Whoever gives the command reads which one, and what to do about it; no engine is left behind."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with booting(checkpoint, "--port", str(port)) as process:
            output, errors = process.communicate(timeout=60)
    assert (output, process.returncode) == ("", 1)
    last = errors.splitlines()[-1]
    assert last.startswith(f"UNAVAILABLE: cannot listen on 127.0.0.1:{port}: "), errors
    assert last.endswith("; if another program has the port, take another (0: any free one)")


@pytest.fixture
def planner(checkpoint) -> Planner:
    return planner_of(checkpoint)


def test_the_engines_death_ends_every_request_and_the_process(checkpoint, planner) -> None:
    with Command(checkpoint) as command, grpc.insecure_channel(command.address, options=CHANNEL_OPTIONS) as channel:
        assert health(channel, "diptych.v1.ExecutorService") == health_pb2.HealthCheckResponse.SERVING
        with Peer(channel) as peer:
            waiting, running = planner.plan(), planner.plan("go", sizes=(), max_tokens=1500)
            peer.start(1, waiting)
            peer.wait_credit(1)
            peer.start(2, running)
            while not peer.answers.get(2) or not peer.answers[2].tokens:
                peer.read()
            os.kill(command.engine_pid(), signal.SIGKILL)
            for handle in (1, 2):
                answer = peer.finish(handle)
                assert answer.code is grpc.StatusCode.UNAVAILABLE
                assert "the engine process ended with exit code -9" in answer.status.message
        assert command.process.wait(10) == 1


def test_a_killed_front_takes_the_engine_along(checkpoint) -> None:
    with Command(checkpoint) as command:
        engine = command.engine_pid()
        command.process.kill()
        until = time.monotonic() + 10
        while Path(f"/proc/{engine}").exists() and time.monotonic() < until:
            time.sleep(0.05)
        assert not Path(f"/proc/{engine}").exists()


def test_an_engine_says_where_it_is(checkpoint) -> None:
    """Asked by SIGUSR1; then it goes on."""
    with Command(checkpoint) as command, grpc.insecure_channel(command.address, options=CHANNEL_OPTIONS) as channel:
        # It serves a moment before its loop begins.
        while "executor_service/engine/loop.py" not in command.engine_stacks():
            assert command.process.poll() is None
        assert health(channel, "diptych.v1.ExecutorService") == health_pb2.HealthCheckResponse.SERVING


def test_overload_is_refused_with_a_delay(checkpoint, planner) -> None:
    settings = ExecutorSettings(model=checkpoint, port=0, max_requests=2, limit_mm_per_prompt={"image": 4})
    with (
        service_thread(lambda: ExecutorServer(settings)) as (server, _),
        grpc.insecure_channel(server.address, options=CHANNEL_OPTIONS) as channel,
        Peer(channel) as peer,
    ):
        for handle in (1, 2, 3):
            peer.start(handle, planner.plan())
        answer = peer.finish(3)
        assert answer.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (answer.facts["limit"], answer.facts["retryable"]) == ("2", "true")
        assert len(answer.status.details) == 2
        assert model_facts(channel).architecture == "LlavaForConditionalGeneration"


def test_an_event_loop_is_all_a_service_needs(checkpoint) -> None:
    """`running` is the lifecycle of production; it starts, serves and stops in any loop."""
    from diptych.service.lifecycle import running

    async def main() -> str:
        async with running(ExecutorServer(ExecutorSettings(model=checkpoint, port=0))) as server:
            return server.address

    assert asyncio.run(main()).startswith("127.0.0.1:")


def test_a_model_whose_positions_raise_fails_that_request_alone(checkpoint) -> None:
    """The hook is a plugin's; the engine process goes on."""
    booted = boot_engine(checkpoint)

    def positions(token_ids: list[int], items: object) -> tuple[list[int], int]:
        if token_ids[0] == 7:
            raise IndexError("a grid that is none")
        return list(range(len(token_ids))), 0

    booted.engine.runner.model.positions = positions
    sampling = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    connection = Scripted([Submit(number, ids, (), sampling, 0, ()) for number, ids in ((1, [5, 6]), (2, [7, 6]))])
    with pytest.raises(EOFError):
        EngineLoop(connection, memoryview(b""), booted).run()
    finished = {one.request_id: one for end in connection.sent if isinstance(end, StepEnd) for one in end.finished}
    assert finished[1].reason is FinishReason.LENGTH
    assert finished[2].reason is FinishReason.FAILED
    assert finished[2].error == "positions: IndexError: a grid that is none"


def test_an_announced_request_that_is_aborted_is_forgotten(checkpoint) -> None:
    """The front has ended it, and expects no report of it."""
    sampling = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    first, second = (Submit(number, [5, 6], (), sampling) for number in (1, 2))
    connection = Scripted([Announce(first), Announce(second), Abort((1,)), Complete(2, (), ())])
    with pytest.raises(EOFError):
        EngineLoop(connection, memoryview(b""), boot_engine(checkpoint)).run()
    ends = [one.request_id for end in connection.sent if isinstance(end, StepEnd) for one in end.finished]
    tokens = [one for step in connection.sent if isinstance(step, StepTokens) for one in step.request_ids]
    assert (ends, tokens) == ([2], [2, 2])


class Scripted:
    """A connection that gives these messages and then ends."""

    def __init__(self, messages: list[ToEngine]) -> None:
        self._messages = messages
        self.sent: list[StepTokens | StepEnd] = []

    def poll(self) -> bool:
        return bool(self._messages)

    def recv(self) -> ToEngine:
        if not self._messages:
            raise EOFError
        return self._messages.pop(0)

    def send_bytes(self, message: bytes) -> None:
        self.sent.append(pickle.loads(message))


@pytest.mark.parametrize(("kind", "limit"), [("longrope", 64), ("dynamic", 128)])
def test_rotary_embeddings_that_look_at_the_whole_batch(tmp_path, kind: str, limit: int) -> None:
    checkpoint = make_llava_checkpoint(tmp_path / "model", max_positions=128)
    config = json.loads((checkpoint / "config.json").read_text())
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    config["text_config"]["rope_parameters"] = rope
    (checkpoint / "config.json").write_text(json.dumps(config))
    if kind == "longrope":
        with pytest.raises(CheckpointError, match=r"rope type 'longrope' .* exceeds 64.*use --max-model-len 64"):
            boot_engine(checkpoint)
    assert boot_engine(checkpoint, max_model_len=limit).report.max_model_len == limit
