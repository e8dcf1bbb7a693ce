"""What is installed here, and what must not be."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from importlib.metadata import files, version
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT

ENVIRONMENT = Path(sys.prefix).name.partition("-")[0]
PACKAGES = ("diptych", "registry", "preprocess_service", "executor_service")
EXPECTED_VERSIONS = {
    "oldest": {"transformers": "5.17.", "protobuf": "6.33.", "grpcio": "1.76.", "grpcio-status": "1.76."},
    "newest": {"protobuf": "7."},
}


def test_there_is_no_torch():
    assert find_spec("torch") is None
    assert find_spec("torchvision") is None


def test_the_versions_are_those_this_environment_is_for():
    for name, prefix in EXPECTED_VERSIONS[ENVIRONMENT].items():
        assert version(name).startswith(prefix), name


@pytest.mark.parametrize("package", PACKAGES)
def test_the_installed_package_is_tested_and_not_the_clone(package):
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).is_relative_to(sys.prefix)


def installed_files() -> set[str]:
    return {str(path) for path in files("diptych") or [] if path.suffix != ".pyc"}


def test_the_wheel_holds_the_four_packages_and_nothing_else():
    top_level = {name.partition("/")[0] for name in installed_files() if not name.startswith("..")}
    metadata = {name for name in top_level if name.endswith(".dist-info")}
    assert top_level - metadata == set(PACKAGES)
    assert {name for name in installed_files() if name.startswith("..")} == {"../../../bin/diptych"}


def test_the_wheel_holds_every_source_file():
    sources = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".pyi") or path.name == "py.typed"
    }
    assert sources <= installed_files()


@pytest.mark.parametrize("name", ["executor", "preprocess", "tensor"])
def test_the_generated_code_is_in_the_wheel(name):
    assert {f"diptych/v1/{name}_pb2.py", f"diptych/v1/{name}_pb2.pyi", f"diptych/v1/{name}_pb2_grpc.py"} <= (
        installed_files()
    )


def test_messages_survive_a_round_trip():
    from diptych.v1 import preprocess_pb2, preprocess_pb2_grpc

    request = preprocess_pb2.GenerateRequest(prompt=preprocess_pb2.Prompt(text="a"), n=2)
    assert preprocess_pb2.GenerateRequest.FromString(request.SerializeToString()) == request
    assert preprocess_pb2_grpc.PreprocessServiceStub


def modules_of(package: str) -> list[str]:
    folder = importlib.import_module(package).__path__
    return [package, *(module.name for module in pkgutil.walk_packages(folder, f"{package}."))]


@pytest.mark.parametrize("package", ["diptych", "registry", "preprocess_service"])
def test_every_module_imports(package):
    for name in modules_of(package):
        if not name.endswith("__main__"):
            importlib.import_module(name)
    assert "torch" not in sys.modules
