"""How paged_decode_attention cuts its work into units: the kernel's own source, compiled for the host."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from executor_service.kernels.cuda.code import SOURCES

DRIVER = Path(__file__).parent / "decode_units.cpp"
HEADER = "paged_decode_attention_units.cuh"
HARDWARE = ("numbers.cuh", "paged_decode_attention.cuh")
"""What the header includes, and the driver has its own for."""
COMPILER = shutil.which("c++")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_units_cover_every_token_of_every_head_once(tmp_path: Path) -> None:
    shutil.copy(SOURCES / HEADER, tmp_path)
    for name in HARDWARE:
        (tmp_path / name).touch()
    program = tmp_path / "decode_units"
    flags = ("-std=c++20", "-O1", "-pthread", "-Wno-unknown-pragmas", f"-I{tmp_path}")
    command = [str(COMPILER), *flags, str(DRIVER), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    done = subprocess.run([str(program)], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
