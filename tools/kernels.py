"""Compiles the CUDA kernels.

    python tools/kernels.py            # cubins for every architecture, and PTX for what comes later
    python tools/kernels.py --check    # one architecture, nothing kept

Says nothing to compile while there is none.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from workspace import ROOT, run

SOURCES = ROOT / "executor_service" / "kernels" / "csrc"
CUBINS = ROOT / "executor_service" / "kernels" / "cubin"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
CHECKED_ARCHITECTURE = "sm_90a"
PTX_ARCHITECTURE = "compute_80"


def kernels() -> list[Path]:
    """Every kernel source."""
    return sorted(SOURCES.glob("*.cu"))


def compile_all(architectures: tuple[str, ...], folder: Path) -> None:
    """One cubin per kernel and architecture."""
    for source in kernels():
        for architecture in architectures:
            target = folder / f"{source.stem}.{architecture}.cubin"
            run(["nvcc", "-std=c++17", f"-arch={architecture}", "-cubin", "-o", target, source])


def compile_ptx(folder: Path) -> None:
    """Code that the driver translates for GPUs newer than every architecture above."""
    for source in kernels():
        run(["nvcc", "-std=c++17", f"-arch={PTX_ARCHITECTURE}", "-ptx", "-o", folder / f"{source.stem}.ptx", source])


def main() -> None:
    """Run the command line."""
    if "--check" in sys.argv:
        with tempfile.TemporaryDirectory() as scratch:
            compile_all((CHECKED_ARCHITECTURE,), Path(scratch))
    elif kernels():
        CUBINS.mkdir(exist_ok=True)
        compile_all(ARCHITECTURES, CUBINS)
        compile_ptx(CUBINS)
    print(f"{len(kernels())} kernels compiled")


if __name__ == "__main__":
    main()
