"""Both services as real processes: asked by the commands, stopped every way there is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from diptych.client import Client, Prompt, RequestError
from tests.checkpoints import make_llava_checkpoint
from tests.cli.command import address_of, descendants, diptych, is_alive, started
from tests.tiny_checkpoint import encoded, picture

FLAGS = ("--port", "0", "--executor-port", "0", "--log-level", "warning", "--device", "cpu", "--max-model-len", "256")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava_checkpoint(tmp_path_factory.mktemp("serve") / "tiny-llava")


@pytest.fixture(scope="module")
def address(model: Path) -> Iterator[str]:
    with started("serve", "--model", model, *FLAGS) as process:
        yield address_of(process)
        below = descendants(process.pid)
        process.terminate()
        assert process.wait(30) == 0
        assert_all_gone(below)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "a.png"
    path.write_bytes(encoded(picture()))
    return path


def test_generate_as_json(address: str, image: Path) -> None:
    arguments = ("--prompt", "<image>a b", "--image", image, "--max-tokens", 5, "--ignore-eos", "--logprobs", 2)
    done = diptych("generate", "--address", address, *arguments, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    assert set(answer) == {"text", "token_ids", "finish_reason", "usage", "logprobs"}
    assert answer["finish_reason"] == "length"
    assert set(answer["usage"]) == {"prompt_tokens", "image_tokens", "cached_tokens", "completion_tokens"}
    assert answer["usage"]["completion_tokens"] == len(answer["token_ids"]) == 5
    assert answer["usage"]["image_tokens"] > 0
    assert [entry["token_id"] for entry in answer["logprobs"]] == answer["token_ids"]
    assert all(len(entry["top"]) == 2 for entry in answer["logprobs"])
    again = diptych("generate", "--address", address, *arguments[:-2], "--json")
    assert json.loads(again.stdout)["token_ids"] == answer["token_ids"], "greedy is the default"
    assert json.loads(again.stdout)["logprobs"] is None
    text = diptych("generate", "--address", address, *arguments[:-2])
    assert text.stdout == answer["text"] + "\n"


def test_how_tokens_are_chosen(address: str) -> None:
    """Flags reach the model: what is biased comes, what is bad does not, and the prompt is scored where asked for."""
    ask = ("generate", "--address", address, "--prompt", "a b", "--max-tokens", 4, "--ignore-eos", "--json")
    biased = json.loads(diptych(*ask, "--logit-bias", "70=100", "--logit-bias", "71=90").stdout)
    assert biased["token_ids"] == [70] * 4
    plain = json.loads(diptych(*ask).stdout)
    done = diptych(
        *ask, "--logit-bias", f"{plain['token_ids'][0]}=-100", "--bad-word", "zebra", "--min-p", 0.1,
        "--repetition-penalty", 1.5, "--presence-penalty", 0.5, "--frequency-penalty", 0.5, "--min-tokens", 2,
        "--prompt-logprobs", 2, "--temperature", 1, "--seed", 4,
    )  # fmt: skip
    answer = json.loads(done.stdout)
    assert plain["token_ids"][0] not in answer["token_ids"]
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"] - 1
    assert all(len(entry["top"]) == 2 and entry["logprob"] < 0 for entry in answer["prompt_logprobs"])
    assert "prompt_logprobs" not in plain
    refused = diptych(*ask, "--min-tokens", 5)
    assert refused.stderr.startswith("INVALID_ARGUMENT: sampling.min_tokens is 5; it must be at most max_tokens")


def test_what_the_server_refuses(address: str) -> None:
    done = diptych("generate", "--address", address, "--prompt", "a", "--temperature", -1)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[0].startswith("INVALID_ARGUMENT: sampling.temperature is -1")
    assert "  stage: admit" in done.stderr.splitlines()


def test_plan_there_equals_plan_here(address: str, model: Path, image: Path) -> None:
    arguments = ("--prompt", "<image>a", "--image", image, "--json")
    there = diptych("plan", "--address", address, *arguments)
    here = diptych("plan", "--model", model, *arguments)
    assert json.loads(there.stdout) == json.loads(here.stdout)


def test_models(address: str) -> None:
    done = diptych("models", "--address", address, "--json")
    (model,) = json.loads(done.stdout)["models"]
    assert (model["name"], model["max_model_len"], model["num_ready_executors"]) == ("tiny-llava", 256, 1)
    assert "tiny-llava" in diptych("models", "--address", address).stdout


def test_health(address: str) -> None:
    done = diptych("health", "--address", address, "--service", "diptych.v1.PreprocessService")
    assert (done.returncode, done.stdout) == (0, "SERVING\n")
    done = diptych("health", "--address", address, "--service", "diptych.v1.Nonsense")
    assert done.returncode == 1


def test_generate_with_services_of_its_own(model: Path, image: Path) -> None:
    done = diptych(
        "generate", "--model", model, "--device", "cpu", "--max-model-len", 256,
        "--prompt", "<image>a", "--image", image, "--max-tokens", 3, "--ignore-eos", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["token_ids"]) == 3


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_nothing_is_left_behind(model: Path, number: signal.Signals, exit_code: int) -> None:
    with started("serve", "--model", model, *FLAGS) as process:
        address_of(process)
        below = descendants(process.pid)
        assert len(below) >= 2
        process.send_signal(number)
        assert process.wait(30) == exit_code
        assert_all_gone(below)


def test_a_dying_child_stops_everything(model: Path) -> None:
    with started("serve", "--model", model, *FLAGS) as process:
        address_of(process)
        below = descendants(process.pid)
        os.kill(below[0], signal.SIGKILL)
        assert process.wait(30) == 1
        assert_all_gone(below)


def test_stopping_while_booting(model: Path) -> None:
    with started("serve", "--model", model, *FLAGS) as process:
        deadline = time.monotonic() + 30
        while not descendants(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        below = descendants(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert_all_gone(below)


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_stopping_does_not_wait_for_imports(model: Path, number: signal.Signals, exit_code: int) -> None:
    """Here they have no end, in either service; that requests would be given time to end is no reason to wait."""
    flags = (*FLAGS, "--plugin", "tests.plugins.endless", "--grace-period", 600)
    with started("serve", "--model", model, *flags, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        for _ in range(3):  # the preprocess service, the executor and its engine
            assert "endless import" in process.stderr.readline()
        below = descendants(process.pid)
        process.send_signal(number)
        assert process.wait(60) == exit_code
        assert_all_gone(below)
        assert "Traceback" not in process.stderr.read()


def test_ctrl_c_while_draining_ends_at_once(model: Path) -> None:
    """Both services are told; an answer that has still time to go on is cut off."""
    flags = (*FLAGS, "--max-model-len", 2048, "--check-integrity", "--grace-period", 600, "--log-level", "info")
    with started("serve", "--model", model, *flags, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        with Client(address_of(process)) as client:
            answer = client.stream(Prompt("a b"), max_tokens=2000, ignore_eos=True)
            next(answer)
            below = descendants(process.pid)
            process.terminate()
            assert any("stopping: draining" in line for line in process.stderr)
            process.send_signal(signal.SIGINT)
            with pytest.raises(RequestError):
                list(answer)
        assert process.wait(60) == 0
        assert_all_gone(below)
        assert "Traceback" not in process.stderr.read()


def assert_all_gone(pids: list[int], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while (alive := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive
