"""Kernels as Python functions: loaded once per device, launched on torch's current stream."""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from executor_service.kernels.cuda.ahead import code_of
from executor_service.kernels.cuda.code import KernelLoadError, MachineCode, sources

POINTER: Final = ctypes.c_void_p
INT: Final = ctypes.c_int
LONG: Final = ctypes.c_longlong
FLOAT: Final = ctypes.c_float
BY_VALUE: Final = None
_NAMES: Final = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def dtype_name(dtype: torch.dtype) -> str:
    """As kernels call it; TypeError for one they do not take."""
    if dtype not in _NAMES:
        raise TypeError(f"the CUDA kernels take {', '.join(_NAMES.values())}, not {dtype}")
    return _NAMES[dtype]


def is_wide(dtype: torch.dtype, *lengths: int) -> bool:
    """Whether rows of these many elements can be read in packs of 16 bytes."""
    return not any(length * dtype.itemsize % 16 for length in lengths)


@dataclass(frozen=True)
class Kernel:
    """A loaded kernel, the C types of its arguments, and how it is launched (see `kernel`)."""

    function: Any
    types: tuple[Any, ...]
    config: Any

    def __call__(self, grid: Sequence[int], block: int, *arguments: Any) -> None:
        """Launch `grid` (up to three dimensions) of blocks of `block` threads; tensors are passed by pointer."""
        from cuda.bindings import driver

        values = tuple(value.data_ptr() if isinstance(value, Tensor) else value for value in arguments)
        config = self.config
        config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1, 1)[:3]
        config.blockDimX = block
        config.hStream = torch.cuda.current_stream().cuda_stream
        (status,) = driver.cuLaunchKernelEx(config, self.function, (values, self.types), 0)
        if status.value:
            raise RuntimeError(f"a kernel could not be launched: {status.name}")


@cache
def kernel(
    source: str,
    name: str,
    types: tuple[Any, ...],
    shared_bytes: int = 0,
    cluster: int = 1,
    is_dependent: bool = False,
) -> Kernel:
    """Function `name` of csrc/`source`.cu on the current device; KernelLoadError if there is none.

    `types` are POINTER, INT, LONG, FLOAT, or BY_VALUE for what is passed as it is (a tensor map). `shared_bytes`
    of dynamic shared memory per block, `cluster` blocks of x that run together. `is_dependent` lets it begin while
    its predecessor on the stream still runs (programmatic dependent launch, from sm_90 on): it calls
    `wait_for_previous` before it touches what anybody else has written or may still read.
    """
    from cuda.bindings import driver

    device = torch.cuda.current_device()
    status, function = driver.cuModuleGetFunction(_module(source, device), name.encode())
    if status.value:
        raise KernelLoadError(f"kernel {source} has no function {name}: {status.name}")
    _allow_shared_bytes(function, name, shared_bytes)
    is_dependent = is_dependent and torch.cuda.get_device_capability(device) >= (9, 0)
    return Kernel(function, types, _launch_config(shared_bytes, cluster, is_dependent))


def _allow_shared_bytes(function: Any, name: str, shared_bytes: int) -> None:
    """Raise the function's limit where need be; never lower it, since others may launch the same with more.

    Also for little, since the function's static memory counts towards what needs no asking.
    """
    if not shared_bytes:
        return
    from cuda.bindings import driver

    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    status, allowed = driver.cuFuncGetAttribute(attribute, function)
    if not status.value:
        (status,) = driver.cuFuncSetAttribute(function, attribute, max(allowed, shared_bytes))
    if status.value:
        raise KernelLoadError(f"kernel {name} cannot have {shared_bytes} bytes of shared memory: {status.name}")


def _launch_config(shared_bytes: int, cluster: int, is_dependent: bool) -> Any:
    """Everything of a launch but grid, block and stream."""
    from cuda.bindings import driver

    config = driver.CUlaunchConfig()
    config.blockDimY = config.blockDimZ = 1
    config.sharedMemBytes = shared_bytes
    attributes = []
    if cluster > 1:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        dimension = attribute.value.clusterDim
        dimension.x, dimension.y, dimension.z = cluster, 1, 1
        attributes.append(attribute)
    if is_dependent:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        attributes.append(attribute)
    config.attrs, config.numAttrs = attributes, len(attributes)
    return config


@cache
def num_multiprocessors(device: int) -> int:
    """Of a device; grids of streaming kernels are multiples of it."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def memory_rate(device: int) -> float:
    """Bytes per second that the clock and the bus of a device's memory allow, two transfers a clock."""
    from cuda.bindings import driver

    kilohertz = _attribute(driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE, device)
    bits = _attribute(driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH, device)
    return 2 * 1000 * kilohertz * bits / 8


def _attribute(attribute: Any, device: int) -> int:
    from cuda.bindings import driver

    torch.cuda.init()
    status, value = driver.cuDeviceGetAttribute(attribute, device)
    if status.value:
        raise RuntimeError(f"{attribute.name} of GPU {device} is not known: {status.name}")
    return int(value)


def load_all(report: Callable[[int, int], None]) -> str:
    """Load every kernel onto the current device, telling `report` (done, all); says where their code came from.

    What must be compiled is compiled on all cores at once.
    """
    names, device = sources(), torch.cuda.current_device()
    torch.cuda.init()
    with ThreadPoolExecutor(os.cpu_count()) as compilers:
        for done, _ in enumerate(compilers.map(lambda name: _code(name, device), names), 1):
            report(done, len(names))
    origins = Counter(_load(name, device)[1] for name in names)
    return ", ".join(f"{count} {origin}" for origin, count in sorted(origins.items()))


def _module(source: str, device: int) -> Any:
    return _load(source, device)[0]


@cache
def _code(source: str, device: int) -> MachineCode:
    return code_of(source, torch.cuda.get_device_capability(device))


@cache
def _load(source: str, device: int) -> tuple[Any, str]:
    from cuda.bindings import driver

    torch.cuda.init()
    torch.cuda.synchronize(device)  # makes the context that the module goes into
    code = _code(source, device)
    status, module = driver.cuModuleLoadData(code.cubin)
    if status.value:
        raise KernelLoadError(f"kernel {source} ({code.origin}) does not load: {status.name}")
    return module, code.origin
