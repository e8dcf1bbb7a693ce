"""Seconds from starting `diptych executor` until it serves, with the weights in the page cache, stage by stage.

Cold: the cache of compiled kernels is empty. Warm: as the boot before has left it. Python's own compiled files are
there in both, as an installation has them: the first boot keeps what it compiles, whatever the environment says, and
the result says whether it could. That boot is not counted, which also reads the weights and the libraries from wherever
they are.
`unaccounted_seconds` is what the stages' lines leave of the time from outside.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Final

from benchmarks.gpu.load import max_model_len
from benchmarks.gpu.options import parse_for_gpu
from benchmarks.gpu.served import make_checkpoint
from benchmarks.gpu.session import ROOT, exit_when_told
from benchmarks.results import make_parser, write_result
from executor_service.imports import compiled_file

GEOMETRIES: Final = ("llava-1.5-7b", "llava-next-mistral-7b")
TARGETS: Final = {"cold": 15.0, "warm": 8.0}
STAGE: Final = re.compile(r"diptych\.boot: (\w+): ([0-9.]+) s(?:, (.*))?")
TOTAL: Final = "boot"
"""The name of the line that the others add up to."""
LISTENING: Final = "listening on "
LIMIT: Final = 120.0
COMPILED: Final = ("torch", "transformers", "executor_service")
"""Packages of which a boot imports most."""


def main(argv: list[str] | None = None) -> int:
    """Print and write the seconds of every boot."""
    parser = make_parser("gpu.boot", __doc__)
    parser.add_argument("--geometries", type=lambda text: tuple(text.split(",")), default=GEOMETRIES[:1])
    parser.add_argument("--repeats", type=int, default=3, help="cold and warm boots each, in turn (default 3)")
    parser.add_argument("--no-first", action="store_true", help="everything was read in this session already")
    parser.add_argument("--device", default="cuda", help="cpu to try it out with a tiny geometry")
    options = parse_for_gpu(parser, argv)
    exit_when_told()
    if options.quick:
        options.repeats = 1
    load_before = os.getloadavg()[0]
    figures: dict[str, Any] = {"shipped_cubins": (ROOT / "executor_service/kernels/cubin/manifest.json").is_file()}
    for geometry in options.geometries:
        make_checkpoint(geometry)
        boots: dict[str, list[dict[str, Any]]] = {"first": [], "cold": [], "warm": []}
        with tempfile.TemporaryDirectory() as folder:
            for number in range(options.repeats):
                if not number and not options.no_first:
                    boots["first"].append(boot(geometry, Path(folder) / "first", options.device))
                for kind in TARGETS:
                    boots[kind].append(boot(geometry, Path(folder) / str(number), options.device))
                figures["compiled_files"] = {package: is_compiled(package) for package in COMPILED}
                figures[geometry] = summary(boots)
                write_result("gpu_boot", figures, options, load_before)
    return 0


def boot(geometry: str, cache: Path, device: str) -> dict[str, Any]:
    """One boot with `cache` for compiled kernels: seconds until it serves, and those of every stage."""
    from benchmarks.gpu.models import checkpoint_folder

    command = [
        sys.executable, "-m", "diptych.cli.main", "executor", "--model", str(checkpoint_folder(geometry)), "--port",
        "0", "--device", device, "--max-model-len", str(max_model_len(geometry)),
    ]  # fmt: skip
    began = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(cache), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    log: list[tuple[float, str]] = []
    assert process.stderr is not None
    reader = threading.Thread(target=_collect, args=(process.stderr, log, began), daemon=True)
    reader.start()
    killer = threading.Timer(LIMIT, process.kill)
    killer.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - began
        if not line.startswith(LISTENING):
            return {"error": "".join(text for _, text in log)[-1500:]}
        time.sleep(0.2)  # the last lines come after the address
        stages = _stages(log)
        known = sum(stage["seconds"] for name, stage in stages.items() if name != TOTAL)
        said = ", ".join(f"{name} {stage['seconds']:.2f}" for name, stage in stages.items())
        print(f"{geometry}: {seconds:.1f} s; {said}", flush=True)
        return {"seconds": seconds, "unaccounted_seconds": seconds - known, "stages": stages}
    finally:
        killer.cancel()
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(5)


def environment(cache: Path) -> dict[str, str]:
    """Kernels are kept in `cache`, and Python keeps what it compiles."""
    return {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONDONTWRITEBYTECODE": ""}


def is_compiled(package: str) -> bool:
    """Whether Python has kept the package's code; else every boot compiles its sources."""
    file = compiled_file(package)
    return file is not None and file.is_file()


def _collect(lines: Any, log: list[tuple[float, str]], began: float) -> None:
    for line in lines:
        log.append((time.perf_counter() - began, line))


def _stages(log: list[tuple[float, str]]) -> dict[str, dict[str, Any]]:
    """Seconds of each stage as it is logged, what it says of itself, and when it was over."""
    stages = {}
    for at, line in log:
        if found := STAGE.search(line):
            stages[found[1]] = {"seconds": float(found[2]), "says": (found[3] or "").strip(), "over_at": at}
    return stages


def summary(boots: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians against the targets."""
    figures: dict[str, Any] = {"boots": boots}
    for kind, target in TARGETS.items():
        seconds = [one["seconds"] for one in boots[kind] if "seconds" in one]
        if seconds:
            median = statistics.median(seconds)
            figures[kind] = {"median_seconds": median, "target": target, "met": median <= target}
    return figures


if __name__ == "__main__":
    sys.exit(main())
