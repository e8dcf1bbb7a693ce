"""A kernel's own header compiled for the host, under a driver that has its own for what the hardware does."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest

from executor_service.kernels.cuda.code import SOURCES

COMPILER: Final = shutil.which("c++")
FLAGS: Final = ("-std=c++20", "-O1", "-pthread", "-Wno-unknown-pragmas")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def check_on_host(folder: Path, driver: str, header: str, hardware: Sequence[str]) -> None:
    """Run `driver` of this folder, which includes csrc/`header`; headers named in `hardware` are empty there."""
    shutil.copy(SOURCES / header, folder)
    for name in hardware:
        (folder / name).touch()
    program = folder / "program"
    source = Path(__file__).parent / driver
    command = [str(COMPILER), *FLAGS, f"-I{folder}", str(source), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    done = subprocess.run([str(program)], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
