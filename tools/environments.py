"""Makes the environments: .venv, and two without torch that tests run in.

    python tools/environments.py develop                       # .venv, again only if what it is made of changed
    python tools/environments.py torch-free oldest|newest      # prints the interpreter's path

Needs nothing but the standard library.
"""

from __future__ import annotations

import datetime
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from workspace import CACHE, ROOT, VENV, digest, locked, run

TORCH = os.environ.get("TORCH") or "torch==2.13.0"
TORCH_INDEX = os.environ.get("TORCH_INDEX", "")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
INSTALLED = ("diptych/", "registry/", "preprocess_service/", "executor_service/", "protos/", "setup.py", "MANIFEST.in")
"""What an installed project is made of, besides its requirements."""
TEST_TOOLS = ("pytest>=8,<10", "pytest-timeout>=2.3,<3")
GRPC_PACKAGES = ("grpcio", "grpcio-channelz", "grpcio-health-checking", "grpcio-reflection", "grpcio-status")
TORCH_FREE = {
    "oldest": ("transformers==5.17.0", "protobuf==6.33.*", *(f"{name}==1.76.0" for name in GRPC_PACKAGES)),
    "newest": ("protobuf>=7",),
}
"""What each environment asks for beyond the project's own requirements."""
MAX_UNUSED_DAYS = 60


def develop() -> None:
    """Bring .venv up to date: CPU or CUDA torch, then the project, editable, with all its extras."""
    stamp = VENV / "diptych-setup"
    protos = sorted((ROOT / "protos").rglob("*.proto"))
    wanted = digest(str(ROOT), sys.version, TORCH, TORCH_INDEX, _requirements(), ROOT / "setup.py", *protos)
    if stamp.is_file() and stamp.read_text() == wanted and (ROOT / "diptych" / "v1" / "__init__.py").is_file():
        return
    _say(f"setting up .venv (Python {sys.version.split()[0]}); the first time takes minutes")
    _make_venv(VENV)
    stamp.unlink(missing_ok=True)
    _install_torch()
    _pip(VENV, "-e", f"{ROOT}[executor,preprocess,dev]")
    stamp.write_text(wanted)


def _requirements() -> str:
    """All of pyproject.toml that decides what gets installed."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return str([content[name] for name in ("build-system", "project")])


def _make_venv(folder: Path) -> None:
    """A fresh environment, unless there is one of this Python."""
    python = folder / "bin" / "python"
    ask = [str(python), "-c", "import sys; print(sys.version)"]
    try:
        if subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip() == sys.version.strip():
            return
    except (OSError, subprocess.CalledProcessError):
        pass
    run([sys.executable, "-m", "venv", "--clear", folder])


def _pip(folder: Path, *arguments: str | Path, python: str = "bin/python") -> None:
    run([folder / python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *arguments])


def _install_torch() -> None:
    """Install the pinned torch; without a GPU its CPU build, which is ten times smaller."""
    if _has(VENV, TORCH):
        return
    for arguments in _torch_builds():
        try:
            _pip(VENV, *arguments)
            return
        except SystemExit as error:
            failure = error
    raise failure


def _torch_builds() -> Sequence[Sequence[str]]:
    """What to ask pip for, until it has it: its own idea of the CPU build, PyTorch's index of them, any build."""
    if TORCH_INDEX:
        return [(TORCH, "--index-url", TORCH_INDEX)]
    if sys.platform != "linux" or Path("/dev/nvidiactl").exists():
        return [(TORCH,)]
    from_pytorch = (f"{TORCH}+cpu", "--index-url", CPU_INDEX, "--retries", "1", "--timeout", "30")
    return [(f"{TORCH}+cpu",), from_pytorch, (TORCH,)]


def _has(folder: Path, requirement: str) -> bool:
    name, _, version = requirement.partition("==")
    code = f"from importlib.metadata import version; print(version({name!r}))"
    done = subprocess.run([folder / "bin" / "python", "-c", code], capture_output=True, text=True, check=False)
    return done.returncode == 0 and done.stdout.strip().partition("+")[0] == version


@contextmanager
def torch_free(name: str) -> Iterator[Path]:
    """The folder of an environment with `.[preprocess]` and no torch, held as long as the block runs.

    It lies outside the clone and lasts between runs. Its dependencies are named by the folder; the
    project in it is installed anew, not editable, whenever a source file has changed.
    """
    requirements = [*TORCH_FREE[name], *TEST_TOOLS]
    month = f"{datetime.date.today():%Y-%m}" if name == "newest" else ""  # "newest" must not grow old
    folder = CACHE / "envs" / f"{name}-{digest(sys.version, month, requirements, _requirements())}"
    with locked(folder.with_suffix(".lock")):
        _prune(folder.parent)
        _fill(folder, name, requirements)
        yield folder


def _fill(folder: Path, name: str, requirements: Sequence[str]) -> None:
    sources, stamp = _sources(), folder / "diptych-installed"
    installed = [name for name in sources if name.startswith(INSTALLED)]
    wanted = digest(*installed, *(ROOT / name for name in installed))
    ready = stamp.is_file()
    if ready and stamp.read_text() == wanted:
        stamp.touch()
        return
    _say(f"{'updating' if ready else 'making'} the {name} torch-free environment")
    if not ready:
        _make_venv(folder)
    with tempfile.TemporaryDirectory() as scratch:
        project = _clean_checkout(sources, Path(scratch)) if name == "oldest" else _built_wheel(sources, Path(scratch))
        if ready:
            _pip(folder, "--force-reinstall", "--no-deps", project)
        else:
            _pip(folder, f"{project}[preprocess]", *requirements)
    stamp.write_text(wanted)


def _sources() -> list[str]:
    """Every file of the clone that git knows or would add."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(name for name in listed.splitlines() if (ROOT / name).is_file())


def _clean_checkout(sources: Sequence[str], scratch: Path) -> Path:
    """The sources as a fresh clone has them: `pip install .` there is what a user runs."""
    for name in sources:
        target = scratch / "clone" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    return scratch / "clone"


def _built_wheel(sources: Sequence[str], scratch: Path) -> Path:
    """The wheel built from the sdist, which is built from a fresh clone."""
    clone = _clean_checkout(sources, scratch)
    run([VENV / "bin" / "pyproject-build", "--outdir", scratch / "dist", clone])
    return next((scratch / "dist").glob("*.whl"))


def _prune(folder: Path) -> None:
    """Remove environments that nothing has used for long."""
    for stamp in folder.glob("*/diptych-installed"):
        if time.time() - stamp.stat().st_mtime > MAX_UNUSED_DAYS * 86400:
            shutil.rmtree(stamp.parent)


def _say(text: str) -> None:
    print(f"environment: {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Run the command line."""
    match sys.argv[1:]:
        case ["develop"]:
            develop()
        case ["torch-free", name] if name in TORCH_FREE:
            with torch_free(name) as folder:
                print(folder / "bin" / "python")
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
