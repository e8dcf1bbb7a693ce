"""What transformers looks up while it is imported: found once, found again when something has changed, and the same."""

from __future__ import annotations

import hashlib
import importlib.metadata
import marshal
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from executor_service import lookups
from executor_service.disk_cache import keep, read_cached
from executor_service.lookups import kept, kept_lookups, kept_scan


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "diptych" / "lookups"


class Maker:
    """Counts how often it was asked."""

    def __init__(self, value: Any) -> None:
        self.value, self.calls = value, 0

    def __call__(self, *_: Any) -> Any:
        self.calls += 1
        return self.value


VALUE = {"llava": {frozenset({"torch"}): {"modeling_llava": {"LlavaModel"}}, frozenset(): {}}}


def test_an_answer_is_made_once_per_state() -> None:
    make = Maker(VALUE)
    assert [kept("a", lambda: "1", make) for _ in range(3)] == [VALUE] * 3
    assert make.calls == 1
    assert kept("a", lambda: "2", make) == VALUE
    assert kept("b", lambda: "2", make) == VALUE
    assert make.calls == 3


def test_a_damaged_answer_is_made_again(cache: Path) -> None:
    make = Maker(VALUE)
    kept("a", lambda: "1", make)
    (file,) = cache.iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert kept("a", lambda: "1", make) == VALUE
    assert make.calls == 2


def test_where_nothing_can_be_kept_everything_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    make = Maker(VALUE)
    assert [kept("a", lambda: "1", make) for _ in range(2)] == [VALUE] * 2
    assert make.calls == 2
    assert kept("b", lambda: "1", Maker(test_where_nothing_can_be_kept_everything_works)) is not None


def test_what_is_kept_is_whole_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    keep(path, b"content")
    assert read_cached(path) == b"content"
    path.write_bytes(path.read_bytes()[:-1])
    assert read_cached(path) is None
    path.write_bytes(hashlib.sha256(b"").digest())
    assert read_cached(path) is None


def _touch(file: Path) -> None:
    file.write_text("a longer text than before")


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: _touch(folder / "llava" / "modeling_llava.py"),
        lambda folder: os.utime(folder / "llava" / "modeling_llava.py", ns=(0, 1)),
        lambda folder: _touch(folder / "llava" / "new.py"),
        lambda folder: (folder / "llava" / "modeling_llava.py").unlink(),
        lambda folder: (folder / "llava").rename(folder / "lava"),
    ],
)
def test_a_folder_is_scanned_again_when_a_file_has_changed(tmp_path: Path, change: Any) -> None:
    folder = tmp_path / "models"
    (folder / "llava").mkdir(parents=True)
    (folder / "llava" / "modeling_llava.py").write_text("")
    scan = Maker(VALUE)
    kept_one = kept_scan(scan, folder)
    for path in (folder, str(folder), folder / "__init__.py", str(folder / "__init__.py")):
        assert kept_one(path) == VALUE
    assert scan.calls == 1
    change(folder)
    assert kept_one(folder) == VALUE
    assert scan.calls == 2
    kept_one(folder / "llava")  # what others ask for is not kept
    assert scan.calls == 3


def test_packages_are_looked_up_again_when_one_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    site.mkdir()
    os.utime(site, ns=(0, 0))
    monkeypatch.syspath_prepend(site)
    look_up = Maker({"torch": ["torch"]})
    monkeypatch.setattr(importlib.metadata, "packages_distributions", look_up)
    monkeypatch.delitem(sys.modules, lookups.SCANNER, raising=False)
    with kept_lookups():
        assert importlib.metadata.packages_distributions() == {"torch": ["torch"]}
        assert importlib.metadata.packages_distributions() == {"torch": ["torch"]}
        assert look_up.calls == 1
        (site / "new-1.0.dist-info").mkdir()
        importlib.metadata.packages_distributions()
        assert look_up.calls == 2
    assert importlib.metadata.packages_distributions is look_up


def test_transformers_is_the_same_with_what_was_kept(cache: Path) -> None:
    """Names, modules and packages that an import finds by itself, finds and keeps, and finds kept."""
    code = """
import contextlib, hashlib, sys
from executor_service.lookups import kept_lookups
with kept_lookups() if sys.argv[1] == "kept" else contextlib.nullcontext():
    import transformers, transformers.models
for module in (transformers, transformers.models):
    state = sorted(map(str, module._class_to_module.items())) + sorted(module._modules) + sorted(module.__all__)
    print(len(state), hashlib.sha256(repr(state).encode()).hexdigest())
print(transformers.LlavaConfig.__module__, any("lookups" in type(finder).__module__ for finder in sys.meta_path))
"""
    runs = [
        subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True).stdout
        for how in ("plain", "kept", "kept")
    ]
    assert runs[0] == runs[1] == runs[2]
    assert int(runs[0].split()[0]) > 1000
    assert runs[0].endswith("transformers.models.llava.configuration_llava False\n")
    (file,) = cache.glob("models.*")
    assert len(marshal.loads(read_cached(file) or b"")[1]) > 100
