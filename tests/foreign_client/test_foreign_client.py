"""A client in another language, from the raw .proto files, gets the streamed answer and reads errors in full.

Needs Node.js with npm; its packages are installed outside the clone.
"""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "foreign_client"


@pytest.fixture(scope="module")
def preprocess_address(served_demo) -> str:
    """HOST:PORT of a preprocess service with the demo model and an executor."""
    return served_demo.preprocess_address


@pytest.fixture(scope="module")
def generate(node_modules, preprocess_address):
    """Sends a GenerateRequest, given as JSON, from Node."""

    def call(request: dict[str, Any]) -> dict[str, Any]:
        command = ["node", HERE / "generate.js", ROOT / "protos", preprocess_address]
        environment = {**os.environ, "NODE_PATH": node_modules}
        done = subprocess.run(
            command, input=json.dumps(request), env=environment, capture_output=True, text=True, check=False, timeout=90
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return call


def picture(colour: int = 0) -> dict[str, str]:
    file = io.BytesIO()
    Image.new("L", (28, 28), colour).save(file, "PNG")
    return {"modality": "MODALITY_IMAGE", "data": base64.b64encode(file.getvalue()).decode()}


def request(num_placeholders: int = 1, num_pictures: int = 1, **sampling: float) -> dict[str, Any]:
    return {
        "prompt": {"text": "<image>" * num_placeholders + "digit?", "media": [picture()] * num_pictures},
        "sampling": {"temperature": 0, "max_tokens": 4, "ignore_eos": True, **sampling},
    }


def test_the_answer_arrives_as_a_stream(generate):
    messages = generate(request())["messages"]
    *pieces, last = messages
    assert pieces, "all in one message is no stream"
    assert sum(len(message.get("token_ids", [])) for message in messages) == 4
    assert isinstance("".join(message.get("text", "") for message in messages), str)
    assert all(message.get("final") is None for message in pieces)
    assert last["final"]["finish_reason"] == "FINISH_REASON_LENGTH"
    assert last["final"]["usage"]["completion_tokens"] == 4
    assert last["final"]["usage"]["image_tokens"] > 0


def test_an_error_carries_its_details(generate):
    error = generate(request(num_placeholders=2, num_pictures=1))["error"]
    assert error["code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert "1" in error["message"]
    assert "2" in error["message"]
    (info,) = [detail for detail in error["details"] if detail["type"] == "google.rpc.ErrorInfo"]
    assert info["domain"] == "diptych.dev"
    assert info["metadata"]["stage"]
    assert info["metadata"]["retryable"] == "false"


def test_a_value_out_of_range_names_limit_and_value(generate):
    error = generate(request(temperature=101))["error"]
    assert error["code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    (info,) = [detail for detail in error["details"] if detail["type"] == "google.rpc.ErrorInfo"]
    assert float(info["metadata"]["limit"]) == 100
    assert float(info["metadata"]["actual"]) == 101
