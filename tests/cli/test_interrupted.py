"""Ctrl-C while the command is still being imported."""

from __future__ import annotations

import subprocess
import sys

import pytest


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
