"""The first GPU's context and every kernel's machine code, made while the process still imports torch.

Needs the driver and, for what is not compiled yet, NVRTC; never torch. What goes wrong here goes wrong again, and is
told, where the kernels are loaded.
"""

from __future__ import annotations

import contextlib
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

from executor_service.kernels.cuda.code import MachineCode, machine_code, sources

Codes = dict[tuple[str, tuple[int, int]], "Future[MachineCode]"]
"""By source and compute capability."""
STACK_BYTES: Final = 256
"""Of every thread that the GPU can run at once, to begin with: a context of the default, 1,024, has 198 MiB more on an
H100. The driver makes it larger at the launch of a kernel that needs more, and leaves it so."""
_BEGUN: list[Future[Codes]] = []


def begin() -> None:
    """Begin, in threads; does nothing the second time."""
    if _BEGUN:
        return
    begun: Future[Codes] = Future()
    _BEGUN.append(begun)
    threading.Thread(target=_begin, args=(begun,), name="kernels-ahead", daemon=True).start()


def code_of(source: str, capability: tuple[int, int]) -> MachineCode:
    """A kernel's machine code: the one that was begun, or else made now."""
    codes: Codes = _BEGUN[0].result() if _BEGUN else {}
    ahead = codes.get((source, capability))
    return machine_code(source, capability) if ahead is None else ahead.result()


def _begin(begun: Future[Codes]) -> None:
    codes: Codes = {}
    with contextlib.suppress(Exception):  # no driver, no GPU: whoever needs one will say so
        device, capability = _first_gpu()
        compilers = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="kernels-ahead")
        compilers.submit(_make_context, device)
        for source in sources():
            codes[source, capability] = compilers.submit(machine_code, source, capability)
    begun.set_result(codes)


def _first_gpu() -> tuple[int, tuple[int, int]]:
    """Its handle and compute capability; RuntimeError if there is none."""
    from cuda.bindings import driver

    def call(function: Any, *arguments: Any) -> Any:
        status, *values = function(*arguments)
        if status.value:
            raise RuntimeError(f"{function.__name__}: {status.name}")
        return values[0] if values else None

    call(driver.cuInit, 0)
    device = call(driver.cuDeviceGet, 0)
    names = driver.CUdevice_attribute
    major = call(driver.cuDeviceGetAttribute, names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
    minor = call(driver.cuDeviceGetAttribute, names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
    return device, (major, minor)


def _make_context(device: int) -> None:
    """The one that torch will use, which takes the driver a while to make; with small stacks."""
    from cuda.bindings import driver

    status, context = driver.cuDevicePrimaryCtxRetain(device)
    if not status.value:
        driver.cuCtxSetCurrent(context)
        driver.cuCtxSetLimit(driver.CUlimit.CU_LIMIT_STACK_SIZE, STACK_BYTES)
