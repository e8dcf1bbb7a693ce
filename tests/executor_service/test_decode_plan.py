"""How paged_decode_attention divides its work: the kernel's own arithmetic, compiled for the host."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from executor_service.kernels.cuda.code import SOURCES

DRIVER = Path(__file__).parent / "decode_plan.cpp"
COMPILER = shutil.which("c++")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_every_leaf_is_in_one_range_and_found_there(tmp_path: Path) -> None:
    program = tmp_path / "decode_plan"
    command = [
        str(COMPILER),
        "-std=c++17",
        "-O1",
        "-Wno-unknown-pragmas",
        f"-I{SOURCES}",
        str(DRIVER),
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    done = subprocess.run([str(program)], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
