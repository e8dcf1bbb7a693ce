"""What the command says when it, or whom it talks to, is stopped in the middle: no traceback, no notes of grpc's."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from diptych.v1 import preprocess_pb2
from tests.cli.command import COMMAND


@pytest.mark.parametrize("module", ["argparse", "diptych.cli.commands", "diptych.cli.health", "grpc"])
def test_ctrl_c_during_imports(module: str) -> None:
    """Raised where the interpreter would raise it, in the import of `module`."""
    code = (
        "import runpy, sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}: raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "sys.argv[1:] = ['health', '--address', '127.0.0.1:1']\n"
        "runpy.run_module('diptych.cli.main', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")


class Unfinished(grpc.GenericRpcHandler):
    """Begins every answer and ends none."""

    def __init__(self) -> None:
        self.is_over = threading.Event()

    def service(self, details: Any) -> grpc.RpcMethodHandler:
        return grpc.unary_stream_rpc_method_handler(self._answer)

    def _answer(self, request: bytes, context: Any) -> Iterator[bytes]:
        yield preprocess_pb2.GenerateResponse(text="so far").SerializeToString()
        self.is_over.wait(60)


def test_a_server_that_is_stopped_in_the_middle_of_an_answer() -> None:
    handler = Unfinished()
    server = grpc.server(ThreadPoolExecutor(2), handlers=(handler,))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    command = [*COMMAND, "generate", "--address", address, "--prompt", "hi"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as asked:
        assert asked.stdout is not None
        assert asked.stdout.read(6) == "so far"
        server.stop(0).wait()
        handler.is_over.set()
        _, stderr = asked.communicate(timeout=30)
    assert asked.returncode == 1
    assert stderr.partition(":")[0] in ("UNAVAILABLE", "CANCELLED")
    assert "chttp2" not in stderr
