"""Stopping: in the midst of a boot, while requests run, in a hurry; whoever watches hears of it."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from diptych.service.lifecycle import CHANNEL_OPTIONS
from tests.cli.command import descendants
from tests.executor_service.commands import Command, booting, health, planner_of, read_until
from tests.executor_service.peer import Peer, Planner


@pytest.fixture
def planner(checkpoint) -> Planner:
    return planner_of(checkpoint)


def test_sigterm_drains(checkpoint, planner) -> None:
    """A running request is answered to its end; the engine process does not outlive the command."""
    with Command(checkpoint) as command, grpc.insecure_channel(command.address, options=CHANNEL_OPTIONS) as channel:
        engine = command.engine_pid()
        with Peer(channel) as peer:
            peer.start(1, planner.plan("go", sizes=(), max_tokens=60))
            while 1 not in peer.answers or not peer.answers[1].tokens:
                peer.read()
            command.process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
            peer.start(2, planner.plan("too late", sizes=()))
            late, early = peer.finish(2), peer.finish(1)
            assert late.code is grpc.StatusCode.UNAVAILABLE
            assert len(early.tokens) == 60
        assert command.process.wait(10) == 0
        assert not Path(f"/proc/{engine}").exists()


def test_health_says_first_that_it_stops(checkpoint, planner) -> None:
    """While answers go on: the port is still open, and whoever asks it, or watches, knows not to send any more."""
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    name = "diptych.v1.ExecutorService"
    with (
        Command(checkpoint, "--grace-period", "600", "--receive-timeout", "600") as command,
        grpc.insecure_channel(command.address, options=CHANNEL_OPTIONS) as channel,
        Peer(channel) as peer,
    ):
        watched = [
            health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=service), timeout=60)
            for service in (name, "")
        ]
        assert [next(watch).status for watch in watched] == [serving, serving]
        peer.start(1, planner.plan())
        peer.wait_credit(1)  # its tensors never come
        command.process.send_signal(signal.SIGTERM)
        assert next(watched[0]).status == not_serving
        with grpc.insecure_channel(command.address, options=(("grpc.use_local_subchannel_pool", 1),)) as late:
            assert health(late, name) == not_serving
            assert health(late, "") == serving, "the process lives as long as it answers"
        peer.cancel(1)
        assert peer.finish(1).code is grpc.StatusCode.CANCELLED
        assert next(watched[1]).status == not_serving
        assert command.process.wait(60) == 0


def test_ctrl_c_while_draining_ends_at_once(checkpoint, planner) -> None:
    """What has still time to go on is ended as it is at the end of that time; the exit code is the first signal's."""
    with (
        Command(checkpoint, "--grace-period", "600", "--receive-timeout", "600") as command,
        grpc.insecure_channel(command.address, options=CHANNEL_OPTIONS) as channel,
        Peer(channel) as peer,
    ):
        peer.start(1, planner.plan())
        peer.wait_credit(1)  # its tensors never come
        command.process.send_signal(signal.SIGTERM)
        read_until(command.process, "stopping: draining")
        command.process.send_signal(signal.SIGINT)
        answer = peer.finish(1)
        assert answer.code is grpc.StatusCode.UNAVAILABLE
        assert answer.status.message == "the executor is stopping"
        assert command.process.wait(60) == 0
        assert "Traceback" not in command.process.stderr.read()


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
@pytest.mark.parametrize("stage", ["start_process", "load_config"])
def test_stopping_while_booting(checkpoint, stage: str, number: signal.Signals, exit_code: int) -> None:
    """Before SERVING it ends the command quietly and leaves no engine behind. Terminals send it to the whole group."""
    with booting(checkpoint) as process:
        read_until(process, stage)
        os.killpg(process.pid, number)
        output, errors = process.communicate(timeout=60)
    assert output == ""
    assert "Traceback" not in errors
    assert process.returncode == exit_code


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_stopping_does_not_wait_for_imports(checkpoint, number: signal.Signals, exit_code: int) -> None:
    """Here they have no end, neither in the front nor in the engine."""
    with booting(checkpoint, "--plugin", "tests.plugins.endless") as process:
        read_until(process, f"endless import in {process.pid}")
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    assert (output, process.returncode) == ("", exit_code)
    assert "Traceback" not in errors


def test_ctrl_c_is_not_for_the_engine(checkpoint) -> None:
    """From its first instruction on: it would write where in its imports it was."""
    with booting(checkpoint) as process:
        until = time.monotonic() + 60
        while not (engine := descendants(process.pid)) and time.monotonic() < until:
            time.sleep(0.002)
        status = Path(f"/proc/{engine[0]}/status").read_text()
    masks = re.findall(r"^Sig(?:Blk|Ign):\t(\w+)$", status, re.MULTILINE)
    assert len(masks) == 2
    assert any(int(mask, 16) >> (signal.SIGINT - 1) & 1 for mask in masks), status
