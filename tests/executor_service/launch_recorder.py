"""Kernels' launches without a GPU: what a `_cuda` function would launch, held to what the kernel's source says.

Every launch is checked by itself: there is such a kernel, the arguments are of its parameters' types, grid and block
are within limits. Tests then ask whether the launch is the right one. Tensors may be on the device "meta": then they
take no memory, and their addresses are their offsets.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from types import ModuleType, SimpleNamespace
from typing import Any, Final, NamedTuple

import pytest
import torch
from torch import Tensor

from executor_service import kernels
from executor_service.kernels.cuda.module import BY_VALUE, FLOAT, INT, LONG, POINTER
from tests.executor_service.compiled_kernels import Compiled, Parameter, compiled

MAX_GRID: Final = (2**31 - 1, 65535, 65535)
SCALARS: Final = {"int": INT, "long long": LONG, "float": FLOAT}
ELEMENTS: Final = {
    "float": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64,
    "long long": torch.int64, "int": torch.int32, "short": torch.int16, "unsigned char": torch.uint8,
}  # fmt: skip
ACCESSES: Final = {"uint4": 16, "unsigned": 4, "unsigned short": 2, "void": 2}
"""Bytes of what says nothing of the elements."""
CLUSTERS: Final = 60
"""Fewer than half of the multiprocessors: some parts of a GPU have an odd number of them."""
COUNTERS: Final = (1 << 20, (1 << 20) + 4, (1 << 20) + 8)
"""Addresses that prefill attention counts at."""


class Gpu(NamedTuple):
    """What launches ask of a GPU."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_of_multiprocessor: int
    shared_of_block: int
    memory_rate: float


H100: Final = Gpu((9, 0), 132, 228 * 1024, 227 * 1024, 3.35e12)
H200: Final = Gpu((9, 0), 132, 228 * 1024, 227 * 1024, 4.8e12)
B200: Final = Gpu((10, 0), 148, 228 * 1024, 227 * 1024, 8e12)
A100: Final = Gpu((8, 0), 108, 164 * 1024, 163 * 1024, 1.94e12)
L40: Final = Gpu((8, 9), 142, 100 * 1024, 99 * 1024, 8.64e11)
GPUS: Final = (H100, H200, B200, A100, L40)


class TensorMap(NamedTuple):
    """What a tensor map was asked for with; see `tensor_map`."""

    address: int
    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]


@dataclass(frozen=True)
class Launch:
    """Of one kernel, its arguments by the names of the kernel's parameters."""

    kernel: Compiled
    grid: tuple[int, int, int]
    block: int
    shared_bytes: int
    cluster: int
    arguments: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def check_arguments(self, **expected: Any) -> None:
        """These are all: the same tensors, equal numbers."""
        assert self.arguments.keys() == expected.keys()
        for name, value in expected.items():
            passed = self.arguments[name]
            assert passed is value if isinstance(value, Tensor) else passed == value, name


def covers(parts: int, each: int, count: int) -> bool:
    """Whether parts of `each` reach `count`, and would not do so without the last one."""
    return (parts - 1) * each < count <= parts * each


@contextmanager
def recorded(gpu: Gpu = H100) -> Iterator[list[Launch]]:
    """A list that gets every launch inside, as on this GPU."""
    launches: list[Launch] = []
    modules = [importlib.import_module(f"{kernels.__name__}.{found.name}") for found in _with_kernels()]
    _forget(modules)
    with pytest.MonkeyPatch.context() as patched:
        for name, value in _replacements(gpu, launches).items():
            for module in modules:
                if hasattr(module, name):
                    patched.setattr(module, name, value)
        properties = SimpleNamespace(
            shared_memory_per_multiprocessor=gpu.shared_of_multiprocessor,
            shared_memory_per_block_optin=gpu.shared_of_block,
        )
        patched.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        patched.setattr(torch.cuda, "get_device_capability", lambda device: gpu.capability)
        yield launches
    _forget(modules)


def recorded_launch(function: Callable[..., Any], *arguments: Any, gpu: Gpu = H100) -> Launch:
    """The only launch of a call."""
    with recorded(gpu) as launches:
        function(*arguments)
    (launch,) = launches
    return launch


def _with_kernels() -> list[pkgutil.ModuleInfo]:
    return [found for found in pkgutil.iter_modules(kernels.__path__) if not found.ispkg]


def _forget(modules: list[ModuleType]) -> None:
    """What they have cached belongs to one GPU, or to none."""
    for module in modules:
        for value in vars(module).values():
            if hasattr(value, "cache_clear") and value.__module__ == module.__name__:
                value.cache_clear()


def _replacements(gpu: Gpu, launches: list[Launch]) -> dict[str, Callable[..., Any]]:
    def kernel(
        source: str,
        name: str,
        types: tuple[Any, ...],
        shared_bytes: int = 0,
        cluster: int = 1,
        is_dependent: bool = False,
    ) -> Callable[..., None]:
        assert name in compiled(source), f"there is no kernel {name}"
        assert is_dependent, "the kernel waits for the one before by itself, so it may begin early"
        assert shared_bytes <= gpu.shared_of_block
        found = compiled(source)[name]
        assert types == tuple(map(_c_type, found.parameters))

        def launch(grid: tuple[int, ...], block: int, *arguments: Any) -> None:
            whole: tuple[int, int, int] = (*grid, 1, 1)[:3]
            launches.append(Launch(found, whole, block, shared_bytes, cluster, _named(found, arguments)))
            _check_limits(launches[-1])

        return launch

    return {
        "kernel": kernel,
        "num_multiprocessors": lambda device: gpu.multiprocessors,
        "memory_rate": lambda device: gpu.memory_rate,
        "tensor_map": TensorMap,
        "_most_clusters": lambda shape: CLUSTERS,
        "_counters": lambda device: list(COUNTERS),
    }


def _c_type(parameter: Parameter) -> Any:
    return POINTER if parameter.type.endswith("*") else SCALARS.get(parameter.type, BY_VALUE)


def _named(found: Compiled, arguments: tuple[Any, ...]) -> dict[str, Any]:
    named = {parameter.name: value for parameter, value in zip(found.parameters, arguments, strict=True)}
    for parameter in found.parameters:
        _check_argument(parameter, named[parameter.name])
    return named


def _check_argument(parameter: Parameter, value: Any) -> None:
    kind = _c_type(parameter)
    if kind is BY_VALUE:
        assert not isinstance(value, Tensor | int | float), parameter
    elif kind is not POINTER:
        assert isinstance(value, float if kind is FLOAT else int), parameter
        bits = 63 if kind is LONG else 31
        assert kind is FLOAT or -(1 << bits) <= value < 1 << bits, parameter
    elif isinstance(value, Tensor):
        elements = parameter.type.removesuffix("*")
        assert value.dtype == ELEMENTS.get(elements, value.dtype), parameter
        assert value.data_ptr() % ACCESSES.get(elements, value.itemsize) == 0, parameter
    else:
        assert type(value) is int, parameter


def _check_limits(launch: Launch) -> None:
    assert 1 <= launch.block <= launch.kernel.max_threads
    assert all(1 <= size <= most for size, most in zip(launch.grid, MAX_GRID, strict=True))
    assert launch.grid[0] % launch.cluster == 0


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16, offset: int = 0) -> Tensor:
    """A dense tensor without memory that begins `offset` elements behind an aligned address."""
    return torch.empty(prod(shape) + offset, dtype=dtype, device="meta")[offset:].view(shape)
