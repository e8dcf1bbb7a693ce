"""Resident memory of this process, for the ledger on CPU."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from torch import nn


def resident_bytes() -> int:
    """Memory that is in RAM now; 0 where the system does not say."""
    return _status_field("VmRSS")


def peak_resident_bytes() -> int:
    """Most memory that was in RAM since `reset_peak`."""
    return _status_field("VmHWM")


def reset_peak() -> None:
    """Start measuring the peak anew; without effect where the system does not allow it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


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
    """Weights and buffers of a model; shared ones once."""
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _status_field(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
