"""Where a kernel's machine code comes from, and that nothing stale or damaged is ever used. Needs no GPU."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest

from executor_service.kernels.cuda import code
from executor_service.kernels.cuda.code import KernelLoadError, architecture, machine_code, source_digest, sources

ROOT = Path(__file__).parents[2]
NAME = "silu_mul"


class Compiler:
    """Counts what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def __call__(self, name: str, arch: str) -> bytes:
        self.asked.append((name, arch))
        return f"cubin {len(self.asked)} of {name} for {arch}".encode()


@pytest.fixture
def compiler() -> Compiler:
    return Compiler()


@pytest.fixture(autouse=True)
def nothing_shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "shipped"
    folder.mkdir()
    monkeypatch.setattr(code, "SHIPPED", folder)
    return folder


def test_every_source_is_known() -> None:
    assert sources() == sorted(path.stem for path in (ROOT / "executor_service/kernels/csrc").glob("*.cu"))
    assert sources()


@pytest.mark.parametrize(
    ("capability", "name"), [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((10, 0), "sm_100")]
)
def test_architecture(capability: tuple[int, int], name: str) -> None:
    assert architecture(capability) == name


def test_compiled_once_and_kept(tmp_path: Path, compiler: Compiler) -> None:
    first = machine_code(NAME, (9, 0), tmp_path, compiler)
    again = machine_code(NAME, (9, 0), tmp_path, compiler)
    assert (first.origin, again.origin) == ("compiled", "cached")
    assert first.cubin == again.cubin == b"cubin 1 of silu_mul for sm_90a"
    assert machine_code(NAME, (8, 0), tmp_path, compiler).origin == "compiled"
    assert compiler.asked == [(NAME, "sm_90a"), (NAME, "sm_80")]


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[:40] + b"x" + data[41:]]
)
def test_a_damaged_cache_is_rebuilt(tmp_path: Path, compiler: Compiler, damage) -> None:
    machine_code(NAME, (9, 0), tmp_path, compiler)
    (file,) = tmp_path.glob("*.cubin")
    file.write_bytes(damage(file.read_bytes()))
    assert machine_code(NAME, (9, 0), tmp_path, compiler).cubin == b"cubin 2 of silu_mul for sm_90a"
    assert machine_code(NAME, (9, 0), tmp_path, compiler).origin == "cached"


@pytest.mark.parametrize("changed", ["silu_mul.cu", "numbers.cuh"])
def test_an_edited_source_is_compiled_anew(
    tmp_path: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    copy = tmp_path / "csrc"
    copy.mkdir()
    for path in code.SOURCES.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(code, "SOURCES", copy)
    machine_code(NAME, (9, 0), tmp_path, compiler)
    with (copy / changed).open("a") as file:
        file.write("// edited\n")
    assert machine_code(NAME, (9, 0), tmp_path, compiler).origin == "compiled"


def test_other_options_are_other_code(
    nothing_shipped: Path, tmp_path: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what was kept nor what is shipped is of these options."""
    machine_code(NAME, (9, 0), tmp_path, compiler)
    ship(nothing_shipped, "sm_80", b"shipped")
    with monkeypatch.context() as changed:
        changed.setattr(code, "OPTIONS", (*code.OPTIONS, "--fmad=false"))
        assert machine_code(NAME, (9, 0), tmp_path, compiler).origin == "compiled"
        assert machine_code(NAME, (8, 0), tmp_path, compiler).origin == "compiled"
    assert machine_code(NAME, (9, 0), tmp_path, compiler).origin == "cached"
    assert machine_code(NAME, (8, 0), tmp_path, compiler).origin == "shipped"


def test_another_compiler_compiles_anew(tmp_path: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    for version, origin in (("13.0.88", "compiled"), ("13.1.2", "compiled"), ("13.0.88", "cached")):
        monkeypatch.setattr(code, "compiler_version", lambda version=version: version)
        assert machine_code(NAME, (9, 0), tmp_path, compiler).origin == origin


@pytest.mark.parametrize("package", ["nvidia_cuda_nvrtc", "nvidia_cuda_nvrtc_cu12"])
def test_the_compilers_version_is_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """The library is not loaded for it."""
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    version = code.compiler_version.__wrapped__
    assert version() == "unknown"
    installed = tmp_path / "site" / f"{package}-13.0.88.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 13.0.88\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    assert version() == "13.0.88"


def test_a_folder_that_cannot_be_written_costs_a_compilation_only(tmp_path: Path, compiler: Compiler) -> None:
    (tmp_path / "file").write_text("")
    for _ in range(2):
        assert machine_code(NAME, (9, 0), tmp_path / "file" / "cache", compiler).origin == "compiled"


def ship(folder: Path, arch: str, cubin: bytes, source: str | None = None) -> None:
    (folder / f"{NAME}.{arch}.cubin").write_bytes(cubin)
    entry = {"source": source or source_digest(NAME), "sha256": hashlib.sha256(cubin).hexdigest()}
    (folder / code.MANIFEST).write_text(json.dumps({f"{NAME}.{arch}.cubin": entry}))


@pytest.mark.parametrize(("arch", "capability"), [("sm_90a", (9, 0)), ("sm_80", (8, 0)), ("sm_80", (8, 6))])
def test_shipped_code_comes_first(
    nothing_shipped: Path, tmp_path: Path, compiler: Compiler, arch: str, capability: tuple[int, int]
) -> None:
    """Code of a generation's first GPU runs on its later ones."""
    ship(nothing_shipped, arch, b"shipped")
    assert machine_code(NAME, capability, tmp_path, compiler).cubin == b"shipped"
    assert not compiler.asked


def test_shipped_code_of_another_source_or_damaged_is_not_used(
    nothing_shipped: Path, tmp_path: Path, compiler: Compiler
) -> None:
    ship(nothing_shipped, "sm_90a", b"shipped", source="0" * 64)
    assert machine_code(NAME, (9, 0), tmp_path, compiler).origin == "compiled"
    ship(nothing_shipped, "sm_90a", b"shipped")
    (nothing_shipped / f"{NAME}.sm_90a.cubin").write_bytes(b"shippee")
    assert machine_code(NAME, (9, 0), tmp_path, compiler).origin == "cached"
    ship(nothing_shipped, "sm_90a", b"shipped")
    (nothing_shipped / code.MANIFEST).write_text("{")
    assert machine_code(NAME, (9, 0), tmp_path, compiler).origin == "cached"


def test_a_newer_generation_does_not_take_an_older_ones(
    nothing_shipped: Path, tmp_path: Path, compiler: Compiler
) -> None:
    ship(nothing_shipped, "sm_90a", b"shipped")
    assert machine_code(NAME, (10, 0), tmp_path, compiler).origin == "compiled"


def test_without_a_compiler_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(
        KernelLoadError, match=r"kernel silu_mul: there is no machine code for sm_90a.*install torch's CUDA"
    ):
        machine_code(NAME, (9, 0), tmp_path)


def test_ptx_is_for_what_comes_later(nothing_shipped: Path, tmp_path: Path, compiler: Compiler) -> None:
    (nothing_shipped / f"{NAME}.ptx").write_bytes(b"ptx")
    entry = {"source": source_digest(NAME), "sha256": hashlib.sha256(b"ptx").hexdigest()}
    (nothing_shipped / code.MANIFEST).write_text(json.dumps({f"{NAME}.ptx": entry}))
    assert machine_code(NAME, (12, 0), tmp_path, compiler).cubin == b"ptx"
    assert machine_code(NAME, (9, 0), tmp_path, compiler).origin == "compiled"
