"""What the commands set for grpc before it is imported."""

from __future__ import annotations

import os
import subprocess
import sys

from diptych.cli import main

CHANNEL = (
    "from diptych.cli.main import set_grpc_defaults\n"
    "set_grpc_defaults()\n"
    "import grpc\n"
    "grpc.insecure_channel('127.0.0.1:1').close()\n"
)


def complaints(**environment: str) -> str:
    names = {name: value for name, value in os.environ.items() if name not in main.GRPC_DEFAULTS}
    done = subprocess.run(
        [sys.executable, "-c", CHANNEL], env=names | environment, capture_output=True, text=True, check=True
    )
    return done.stderr


def test_grpc_knows_what_it_is_told() -> None:
    assert complaints() == ""
    assert "no_such_thing" in complaints(GRPC_EXPERIMENTS="-no_such_thing")


def test_what_somebody_has_set_stays(monkeypatch) -> None:
    monkeypatch.setenv("GRPC_VERBOSITY", "DEBUG")
    monkeypatch.setenv("GRPC_EXPERIMENTS", "")  # so that it is as before afterwards
    monkeypatch.delenv("GRPC_EXPERIMENTS")
    main.set_grpc_defaults()
    assert os.environ["GRPC_VERBOSITY"] == "DEBUG"
    assert os.environ["GRPC_EXPERIMENTS"] == main.GRPC_DEFAULTS["GRPC_EXPERIMENTS"]
