"""What memory there is and what this process has of it: on the host for the ledger, on a GPU to size by."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import nn


class Memory(Protocol):
    """The device's memory, and the peak of this process's own use of it."""

    total_bytes: int

    @property
    def own_bytes(self) -> int:
        """What this process has of a GPU's, libraries included; of the host's, what it had at `begin`."""

    def begin(self) -> None:
        """Measure peaks from here on, beyond what is in use now."""

    def restart(self) -> None:
        """Forget the peak, but not what was in use at `begin`."""

    def peak_bytes(self) -> int:
        """Most that was in use since `begin` or `restart`, beyond what was at `begin`."""

    def reserved_peak_bytes(self) -> int:
        """Most that the allocator had in all since `begin` or `restart`; 0 where nothing is sized by it."""


def memory_of(device: torch.device) -> Memory:
    """What to measure a device by."""
    return DeviceMemory(device) if device.type == "cuda" else HostMemory()


class HostMemory:
    """Resident memory; 0 where the system does not say. `own_bytes` is what there was at `begin`."""

    def __init__(self) -> None:
        self.total_bytes = host_bytes()
        self.own_bytes = 0

    def begin(self) -> None:
        """See Memory."""
        self.own_bytes = _status_field("VmRSS")
        self.restart()

    def restart(self) -> None:
        """Without effect where the system does not allow it."""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def peak_bytes(self) -> int:
        """See Memory."""
        return max(_status_field("VmHWM") - self.own_bytes, 0)

    def reserved_peak_bytes(self) -> int:
        """See Memory."""
        return 0


class DeviceMemory:
    """A GPU's, by torch's allocator and by the driver."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._driver = DriverMemory(device)
        self.total_bytes = torch.cuda.mem_get_info(device)[1]
        self._before = 0

    def begin(self) -> None:
        """See Memory."""
        torch.cuda.synchronize(self._device)
        self._before = torch.cuda.memory_allocated(self._device)
        self.restart()

    def restart(self) -> None:
        """What the allocator has kept of what is freed goes back first, so that it is in no later peak."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak_bytes(self) -> int:
        """See Memory."""
        return max(torch.cuda.max_memory_allocated(self._device) - self._before, 0)

    def reserved_peak_bytes(self) -> int:
        """See Memory."""
        return torch.cuda.max_memory_reserved(self._device)

    @property
    def free_bytes(self) -> int:
        """What nobody has."""
        return torch.cuda.mem_get_info(self._device)[0]

    @property
    def own_bytes(self) -> int:
        """Everything that this process has of the GPU: tensors, context, libraries, graphs; never a neighbour's."""
        torch.cuda.synchronize(self._device)
        own = self._driver.own_bytes()
        return self.total_bytes - self.free_bytes if own is None else own

    @property
    def own_bytes_beside_torch(self) -> int:
        """What of that is not torch's allocator's: context, libraries, graphs."""
        return max(self.own_bytes - torch.cuda.memory_reserved(self._device), 0)


_NVML_LIBRARY: Final = "libnvidia-ml.so.1"
_MAX_PROCESSES: Final = 1024
_NOT_AVAILABLE: Final = (1 << 64) - 1


class _ProcessInfo(ctypes.Structure):
    """As nvmlDeviceGetComputeRunningProcesses_v3 writes it."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used_bytes", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class DriverMemory:
    """What the driver says of processes, by its management library (NVML)."""

    def __init__(self, device: torch.device) -> None:
        self._library: Any = None
        self._handle = ctypes.c_void_p()
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(_NVML_LIBRARY)
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
            opened = library.nvmlInit_v2() == 0
            if opened and library.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(self._handle)) == 0:
                self._library = library

    def own_bytes(self) -> int | None:
        """This process's; None where the driver does not tell (then a container hides process numbers)."""
        if self._library is None:
            return None
        count = ctypes.c_uint(_MAX_PROCESSES)
        processes = (_ProcessInfo * _MAX_PROCESSES)()
        status = self._library.nvmlDeviceGetComputeRunningProcesses_v3(self._handle, ctypes.byref(count), processes)
        if status != 0:
            return None
        used = [entry.used_bytes for entry in processes[: count.value] if entry.pid == os.getpid()]
        return None if not used or used[0] in (0, _NOT_AVAILABLE) else int(used[0])


def host_bytes() -> int:
    """Memory of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_bytes() -> int:
    """Memory that a new allocation could get; half the machine where the system does not say."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
    return host_bytes() // 2


def parameter_bytes(model: nn.Module) -> int:
    """Weights and buffers of a model; memory that several share once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


def _status_field(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
