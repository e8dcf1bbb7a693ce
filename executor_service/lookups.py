"""What importing transformers looks up in thousands of files, kept for the next boot.

It reads the sources of all its models for the names that they export, twice, and some versions read the metadata of all
packages that are installed. That is more than half of what there is to import behind torch, and the answers stay the
same until something is installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import marshal
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from executor_service.disk_cache import cache_folder, keep, read_cached

SCANNER: Final = "transformers.utils.import_utils"
SCAN: Final = "create_import_structure_from_path"
"""Of the scanner: a folder, or the file of its package -> nested dicts of plain values."""
FOLDER: Final = "models"


@contextlib.contextmanager
def kept_lookups() -> Iterator[None]:
    """Inside, transformers, should it be imported, gets its answers from files where they are still right."""
    if SCANNER in sys.modules:
        yield
        return
    finder, look_up = _Finder(), importlib.metadata.packages_distributions
    sys.meta_path.insert(0, finder)
    importlib.metadata.packages_distributions = lambda: kept("packages", _state_of_packages, look_up)
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = look_up
        sys.meta_path.remove(finder)


class _Finder(MetaPathFinder):
    """Finds the scanner as everybody does, and changes it once its code has run."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == SCANNER else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_change(module: ModuleType) -> None:
            run(module)
            if scan := getattr(module, SCAN, None):
                setattr(module, SCAN, kept_scan(scan, Path(str(module.__file__)).parent.parent / FOLDER))

        spec.loader.exec_module = run_and_change  # type: ignore[method-assign]
        return spec


def kept_scan(scan: Callable[[Any], Any], folder: Path) -> Callable[[Any], Any]:
    """`scan`, with what it finds in `folder` as a whole kept."""

    def scan_or_read(path: str | Path) -> Any:
        if Path(path) not in (folder, folder / "__init__.py"):
            return scan(path)
        return kept(FOLDER, lambda: _state_of_files(folder), lambda: scan(path))

    return scan_or_read


def kept(name: str, state_of: Callable[[], str], make: Callable[[], Any]) -> Any:
    """What `make` returns, or has returned before in the same state; plain values."""
    installation = hashlib.sha256(f"{sys.implementation.cache_tag} {sys.prefix}".encode()).hexdigest()[:16]
    file = cache_folder("lookups") / f"{name}.{installation}.marshal"
    state = state_of()
    if (content := read_cached(file)) is not None:
        state_then, value = marshal.loads(content)  # noqa: S302 - our own, and whole; as Python's compiled files
        if state_then == state:
            return value
    value = make()
    with contextlib.suppress(ValueError):  # no plain value after all
        keep(file, marshal.dumps((state, value)))
    return value


def _state_of_packages() -> str:
    """Changes whenever a package comes or goes: it has an entry in a folder of sys.path."""
    states = []
    for folder in sys.path:
        with contextlib.suppress(OSError):
            states.append(f"{folder} {os.stat(folder or os.curdir).st_mtime_ns}")
    return _digest(states)


def _state_of_files(folder: Path) -> str:
    """Changes with any file below."""
    return _digest(sorted(_files_below(str(folder))))


def _files_below(folder: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir():
                status = entry.stat()
                yield f"{entry.path} {status.st_size} {status.st_mtime_ns}"
            elif entry.name != "__pycache__":
                yield from _files_below(entry.path)


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
