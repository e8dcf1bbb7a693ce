"""Machine code of a kernel source for one GPU: shipped with the package, kept from an earlier boot, or compiled now.

What is found on disk is believed only if it belongs to this very source and is whole; else it is made anew. What was
kept is also made anew when another compiler is installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from executor_service.disk_cache import cache_folder, keep, read_cached

SOURCES: Final = Path(__file__).resolve().parent.parent / "csrc"
SHIPPED: Final = Path(__file__).resolve().parent.parent / "cubin"
MANIFEST: Final = "manifest.json"
OPTIONS: Final = ("--std=c++17", "--extra-device-vectorization")
NVRTC_PACKAGES: Final = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")
"""As wheels of torch for CUDA 13 and for CUDA 12 ask for it."""
NEWEST_SHIPPED: Final = 10
"""The major compute capability of the newest architecture that `make kernels` makes cubins for."""


class KernelLoadError(RuntimeError):
    """A kernel's machine code cannot be had or loaded; says which, and why."""


@dataclass(frozen=True)
class MachineCode:
    """A cubin, or PTX for a GPU newer than all that cubins are shipped for; shipped, cached or compiled."""

    cubin: bytes
    origin: str


def sources() -> list[str]:
    """Names of all kernel sources."""
    return sorted(path.stem for path in SOURCES.glob("*.cu"))


def architecture(capability: tuple[int, int]) -> str:
    """What to compile for: features that only one generation has where ours use them."""
    major, minor = capability
    return "sm_90a" if capability == (9, 0) else f"sm_{major}{minor}"


def source_digest(name: str) -> str:
    """SHA-256 over options, a source and all headers: what its machine code depends on, besides the compiler."""
    sha = hashlib.sha256()
    files = (path.read_bytes() for path in (SOURCES / f"{name}.cu", *sorted(SOURCES.glob("*.cuh"))))
    for content in (" ".join(OPTIONS).encode(), *files):
        sha.update(len(content).to_bytes(8, "big") + content)
    return sha.hexdigest()


@cache
def compiler_version() -> str:
    """NVRTC's, by its package: a boot that finds all code on disk has no other use for the library, and loads none."""
    for package in NVRTC_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return "unknown"


def machine_code(
    name: str, capability: tuple[int, int], cache: Path | None = None, compiler: Callable[..., bytes] | None = None
) -> MachineCode:
    """The cubin of source `name` for a GPU; KernelLoadError with the compiler's own words if there is none."""
    digest = source_digest(name)
    if (cubin := _shipped(name, capability, digest)) is not None:
        return MachineCode(cubin, "shipped")
    arch = architecture(capability)
    path = (cache or cache_folder("kernels")) / f"{name}.{arch}.nvrtc-{compiler_version()}.{digest[:32]}.cubin"
    if (cubin := read_cached(path)) is not None:
        return MachineCode(cubin, "cached")
    cubin = (compiler or compile_with_nvrtc)(name, arch)
    keep(path, cubin)
    return MachineCode(cubin, "compiled")


def _shipped(name: str, capability: tuple[int, int], digest: str) -> bytes | None:
    """One of `make kernels`; code for an older GPU of the same generation runs as well, PTX on all that come later."""
    try:
        manifest: dict[str, Any] = json.loads((SHIPPED / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    major, minor = capability
    files = [f"{name}.{architecture(capability)}.cubin"]
    files += [f"{name}.sm_{major}{older}.cubin" for older in range(minor, -1, -1)]
    if major > NEWEST_SHIPPED:
        files.append(f"{name}.ptx")
    for file in files:
        entry = manifest.get(file)
        if entry is None or entry["source"] != digest:
            continue
        with contextlib.suppress(OSError):
            content = (SHIPPED / file).read_bytes()
            if hashlib.sha256(content).hexdigest() == entry["sha256"]:
                return content
    return None


def compile_with_nvrtc(name: str, arch: str) -> bytes:
    """Compile a source with the library that torch's CUDA wheel brings."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise KernelLoadError(
            f"kernel {name}: there is no machine code for {arch}, and none can be compiled: {error}; "
            "install torch's CUDA build, which brings cuda-bindings and NVRTC"
        ) from error
    text = (SOURCES / f"{name}.cu").read_bytes()
    headers = sorted(SOURCES.glob("*.cuh"))
    program = _checked(
        nvrtc.nvrtcCreateProgram(
            text, f"{name}.cu".encode(), len(headers), [path.read_bytes() for path in headers],
            [path.name.encode() for path in headers],
        ),
        f"kernel {name}",
    )  # fmt: skip
    try:
        options = [option.encode() for option in (*OPTIONS, f"--gpu-architecture={arch}")]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise KernelLoadError(f"kernel {name} does not compile for {arch}: {status.name}\n{_log(nvrtc, program)}")
        size = _checked(nvrtc.nvrtcGetCUBINSize(program), f"kernel {name}")
        cubin = b" " * size
        _checked(nvrtc.nvrtcGetCUBIN(program, cubin), f"kernel {name}")
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _log(nvrtc: Any, program: Any) -> str:
    size = _checked(nvrtc.nvrtcGetProgramLogSize(program), "the compiler's log")
    log = b" " * size
    _checked(nvrtc.nvrtcGetProgramLog(program, log), "the compiler's log")
    return log.rstrip(b"\0 \n").decode(errors="replace")


def _checked(result: tuple[Any, ...], what: str) -> Any:
    """The value of a call that succeeded."""
    status, *values = result
    if status.value:
        raise KernelLoadError(f"{what}: {status.name}")
    return values[0] if values else None
