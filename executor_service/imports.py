"""What an executor's processes do not import: what torch and transformers load for others' use wherever it is there."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from executor_service.lookups import kept_lookups

UNUSED: Final = ("accelerate", "librosa", "peft", "scipy", "sklearn", "torchaudio", "torchvision")
"""Seconds to import, and used by transformers for what no executor does: training, audio files, beam heuristics, its
own image processors. They are optional to it."""
MARKS: Final = ("allow_in_graph", "assume_constant_result", "disable")
COMPILER: Final = "torch._dynamo"
"""Takes seconds with sympy behind it. transformers marks functions for it, and torch keeps what it does on the meta
device from it; either imports it."""
_ONE_AT_A_TIME: Final = threading.RLock()


@contextlib.contextmanager
def lean_imports() -> Iterator[None]:
    """Inside, packages seem not to be installed, torch not to be distributed, and its compiler is not imported.

    What transformers looks up while it is imported is kept. Afterwards a model's own code may import it all. What has
    been imported already stays.
    """
    with _ONE_AT_A_TIME, kept_lookups(), _hidden(UNUSED), without_compiler(), _not_distributed():
        yield


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Inside, what is marked for torch's compiler, or is to be kept from it, does not import it."""
    if COMPILER in sys.modules:
        yield
        return
    package = sys.modules[COMPILER] = UnrunPackage(COMPILER, MARKS)
    try:
        yield
    finally:
        package.leave()


@contextlib.contextmanager
def _hidden(names: tuple[str, ...]) -> Iterator[None]:
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: not to be found
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextlib.contextmanager
def _not_distributed() -> Iterator[None]:
    """As a torch that was built without it; transformers asks once and keeps the answer."""
    distributed = importlib.import_module("torch.distributed")
    is_available = distributed.is_available
    vars(distributed)["is_available"] = lambda: False
    try:
        yield
    finally:
        vars(distributed)["is_available"] = is_available


def compiled_file(package: str) -> Path | None:
    """Where Python keeps a package's code, whether or not it has; None if nowhere."""
    spec = importlib.util.find_spec(package)
    return None if spec is None or spec.cached is None else Path(spec.cached)


def compiled_anew(package: str) -> str:
    """What to say where Python has not kept an imported package's code; "" where it has."""
    file = compiled_file(package)
    if file is None or file.is_file():
        return ""
    reason = "is told not to keep it" if sys.dont_write_bytecode else f"cannot keep it in {file.parent}"
    return f"Python compiles {package} at every boot: it {reason}"


class UnrunPackage(ModuleType):
    """Stands for a package whose own code has not run: it has decorators that only mark, and where its modules lie.

    Asked for anything else it makes way for the package itself.
    """

    def __init__(self, name: str, marks: tuple[str, ...]) -> None:
        super().__init__(name)
        top, *folders = name.split(".")
        spec = importlib.util.find_spec(top)
        if spec is None or spec.origin is None:
            raise ImportError(f"{top} is not installed")
        self.__path__ = [str(Path(spec.origin).parent.joinpath(*folders))]
        for mark in marks:
            setattr(self, mark, _mark)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self.leave()
        return getattr(importlib.import_module(self.__name__), name)

    def leave(self) -> None:
        """Whoever imports the package from now on runs it."""
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]


def _mark(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    """A decorator with or without arguments, which changes nothing."""
    return _mark if function is None else function
