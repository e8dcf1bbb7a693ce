"""The client programs of docs/protocol.md, run as they stand against both services."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from demo.measuring.index import read_index
from tests.conftest import DEMO_MODEL

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "protocol.md").read_text("utf-8")
DIGIT = read_index(DEMO_MODEL.parent / "held_out")[0]
(PICTURE,) = DIGIT.pictures
(ANSWER,) = json.loads((DEMO_MODEL / "held_out_answers.json").read_text("utf-8"))["said"][DIGIT.number]


def program(language: str, path: Path) -> Path:
    (code,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    path.write_text(code, "utf-8")
    return path


@pytest.fixture(scope="module")
def python_client(tmp_path_factory) -> list:
    return [sys.executable, program("python", tmp_path_factory.mktemp("page") / "client.py")]


@pytest.fixture(scope="module")
def node_client(tmp_path_factory, node_modules) -> list:
    os.environ["NODE_PATH"] = node_modules
    return ["node", program("js", tmp_path_factory.mktemp("page") / "client.js"), ROOT / "protos"]


@pytest.mark.parametrize("client", ["python_client", "node_client"])
def test_a_client_gets_the_answer(served_demo, request, client: str) -> None:
    command = [*request.getfixturevalue(client), served_demo.preprocess_address, PICTURE]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == ANSWER


@pytest.mark.parametrize("client", ["python_client", "node_client"])
def test_a_client_survives_an_error_without_details(request, client: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and nobody listens
        command = [*request.getfixturevalue(client), f"127.0.0.1:{closed.getsockname()[1]}", PICTURE]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(("UNAVAILABLE: ", "14: "))
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("client", ["python_client", "node_client"])
def test_a_client_shows_the_error(served_demo, request, tmp_path, client: str) -> None:
    (tmp_path / "no-picture.png").write_bytes(b"nothing of the kind")
    command = [*request.getfixturevalue(client), served_demo.preprocess_address, tmp_path / "no-picture.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "INVALID_ARGUMENT" in done.stderr or done.stderr.startswith("3: ")
    assert "JPEG" in done.stderr
