"""What the engine process leaves out of its imports, and that all of it is there for whoever imports it later."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from executor_service.imports import UNUSED


def run(code: str, *folders: Path) -> list[str]:
    """Lines that an interpreter of its own prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, folders), os.getcwd()])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return done.stdout.splitlines()


def test_packages_that_no_engine_uses_are_not_imported(tmp_path: Path) -> None:
    """Each is installed here, and dear; behind the imports a model's own code may have it."""
    for name in UNUSED:
        (tmp_path / f"{name}.py").write_text(f"print('imported', {name!r})\n")
        metadata = tmp_path / f"{name}-99.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0\n")
        (metadata / "top_level.txt").write_text(name)
    code = """
from executor_service.imports import UNUSED, lean_imports
with lean_imports():
    import executor_service.engine.boot
import sys
print([name for name in UNUSED if name in sys.modules])
import sklearn
"""
    assert run(code, tmp_path) == ["[]", "imported sklearn"]


def test_the_compiler_is_not_imported_and_there_afterwards() -> None:
    code = """
from executor_service.imports import lean_imports
with lean_imports():
    import executor_service.engine.boot, executor_service.models.llava
import sys, torch
dear = ("sympy", "torch._dynamo", "torch._dynamo.utils", "torch.distributed.tensor")
print([name for name in dear if name in sys.modules])
print(torch.distributed.is_available(), torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item())
print("torch._dynamo.utils" in sys.modules)
"""
    assert run(code) == ["[]", "True 2.0", "True"]


def test_nothing_of_an_engine_needs_the_compiler(checkpoint: Path) -> None:
    """A step that imported it would stand for seconds."""
    code = f"""
from executor_service.imports import lean_imports
with lean_imports():
    import executor_service.engine.boot
from pathlib import Path

import pytest
from PIL import Image
from tests.executor_service.conftest import Bench, boot_engine
import sys
bench = Bench(Path({str(checkpoint)!r}), boot_engine(Path({str(checkpoint)!r})), None)
request = bench.request(1, "a <image> b", [Image.new("RGB", (40, 30))])
print(len(bench.run([request])[1]), "torch._dynamo" in sys.modules)
"""
    assert run(code) == ["12 False"]


def test_a_package_that_has_not_run_makes_way() -> None:
    """For whatever is no mark; what lies in it can be imported all the while."""
    code = """
import sys
from executor_service.imports import MARKS, UnrunPackage, lean_imports
with lean_imports():
    import torch._dynamo.config
    package = sys.modules["torch._dynamo"]
    print(type(package) is UnrunPackage, package.disable()(len) is len)
    print(all(getattr(package, mark)(len) is len for mark in MARKS))
    print(package.reset.__module__, type(sys.modules["torch._dynamo"]) is UnrunPackage)
print(sys.modules["torch._dynamo"].config is sys.modules["torch._dynamo.config"])
"""
    assert run(code) == ["True True", "True", "torch._dynamo False", "True"]


def test_what_is_compiled_at_every_boot_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_package").mkdir()
    (tmp_path / "a_package" / "__init__.py").write_text("")
    code = "import a_package; from executor_service.imports import compiled_anew; print(compiled_anew('a_package'))"
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    assert run(code, tmp_path) == ["Python compiles a_package at every boot: it is told not to keep it"]
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "")
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path / "a_package" / "__init__.py"))
    (line,) = run(code, tmp_path)
    assert line.startswith(f"Python compiles a_package at every boot: it cannot keep it in {tmp_path}")
    monkeypatch.delenv("PYTHONPYCACHEPREFIX")
    assert run(code, tmp_path) == [""]
