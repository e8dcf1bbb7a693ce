"""Compiles the CUDA kernels.

    python tools/kernels.py            # cubins for every architecture, PTX for what comes later, and a manifest
    python tools/kernels.py --check    # one architecture, nothing kept

Needs nvcc and no GPU. The executor uses a shipped cubin only where the manifest says that it is of the very source
beside it; where there is none it compiles at its first boot.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from workspace import ROOT, run

sys.path.insert(0, str(ROOT))
from executor_service.kernels.cuda.code import MANIFEST, SHIPPED, SOURCES, source_digest

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
CHECKED_ARCHITECTURE = "sm_90a"
PTX_ARCHITECTURE = "compute_80"


def kernels() -> list[Path]:
    """Every kernel source."""
    return sorted(SOURCES.glob("*.cu"))


def compile_all(architectures: tuple[str, ...], folder: Path) -> Iterator[tuple[Path, Path]]:
    """One cubin per kernel and architecture; yields source and cubin."""
    for source in kernels():
        for architecture in architectures:
            target = folder / f"{source.stem}.{architecture}.cubin"
            code = f"arch={architecture.replace('sm', 'compute')},code={architecture}"
            run(["nvcc", "-std=c++17", "-Werror=all-warnings", f"-gencode={code}", "-cubin", "-o", target, source])
            yield source, target


def compile_ptx(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Code that the driver translates for GPUs newer than every architecture above; yields source and PTX."""
    for source in kernels():
        target = folder / f"{source.stem}.ptx"
        run(["nvcc", "-std=c++17", f"-arch={PTX_ARCHITECTURE}", "-ptx", "-o", target, source])
        yield source, target


def ship() -> None:
    """Everything into the package, and what each cubin was made of."""
    SHIPPED.mkdir(exist_ok=True)
    for stale in SHIPPED.iterdir():
        stale.unlink()
    made = [*compile_all(ARCHITECTURES, SHIPPED), *compile_ptx(SHIPPED)]
    manifest = {
        code.name: {"source": source_digest(source.stem), "sha256": hashlib.sha256(code.read_bytes()).hexdigest()}
        for source, code in made
    }
    (SHIPPED / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")


def main() -> None:
    """Run the command line."""
    if "--check" in sys.argv:
        with tempfile.TemporaryDirectory() as scratch:
            list(compile_all((CHECKED_ARCHITECTURE,), Path(scratch)))
    else:
        ship()
    print(f"{len(kernels())} kernels compiled")


if __name__ == "__main__":
    main()
