"""Everything that can be said about the source without running it.

A check whose tool is missing is skipped in one line that names it; with STRICT=1 or CI=true that fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from kernels import kernels
from node_packages import node_modules
from workspace import ROOT, VENV, is_strict

BIN = VENV / "bin"
Command = Sequence[str | Path]


class MissingToolError(Exception):
    """What to install for a check that cannot run."""


def buf() -> Command:
    """Lints the protos."""
    if shutil.which("npm") is None:
        raise MissingToolError("Node.js with npm")
    return [node_modules(ROOT / "tools" / "buf" / "package.json") / ".bin" / "buf", "lint", "protos"]


def compose(*profiles: str) -> Callable[[], Command]:
    """Validates compose.yaml with these profiles."""

    def command() -> Command:
        flags = [flag for name in profiles for flag in ("--profile", name)]
        return [*_compose_tool(), "-f", "compose.yaml", *flags, "config", "--quiet"]

    return command


def _compose_tool() -> Command:
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    if shutil.which("docker") and _succeeds("docker", "compose", "version"):
        return ["docker", "compose"]
    raise MissingToolError("docker-compose")


def _succeeds(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def hadolint() -> Command:
    """Lints the Dockerfile."""
    tool = BIN / "hadolint" if (BIN / "hadolint").exists() else shutil.which("hadolint")
    if tool is None:
        raise MissingToolError("hadolint")
    return [tool, "--no-color", "Dockerfile"]


def nvcc() -> Command:
    """Compiles every kernel for one architecture."""
    if kernels() and shutil.which("nvcc") is None:
        raise MissingToolError("nvcc, from the CUDA toolkit")
    return [sys.executable, "tools/kernels.py", "--check"]


CHECKS: dict[str, Callable[[], Command]] = {
    "ruff": lambda: [BIN / "ruff", "check", "--quiet"],
    "format": lambda: [BIN / "ruff", "format", "--check", "--quiet"],
    "mypy": lambda: [BIN / "mypy"],
    "imports": lambda: [BIN / "lint-imports", "--no-logo"],
    "protos": buf,
    "compose": compose(),
    "compose gpu": compose("gpu"),
    "compose prometheus": compose("prometheus"),
    "Dockerfile": hadolint,
    "kernels": nvcc,
}


def run_check(name: str, make: Callable[[], Command]) -> bool:
    """Run one check; what it prints matters only if it fails."""
    started = time.monotonic()
    try:
        command = make()
    except MissingToolError as error:
        print(f"SKIPPED: {name} (install {error})", flush=True)
        return not is_strict()
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        print(f"{done.stdout}\nFAILED: {name}", flush=True)
    else:
        print(f"ok: {name} ({time.monotonic() - started:.1f} s)", flush=True)
    return done.returncode == 0


def main() -> None:
    """Run every check, also after one has failed."""
    failed = [name for name, make in CHECKS.items() if not run_check(name, make)]
    if failed:
        raise SystemExit(f"make check: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
