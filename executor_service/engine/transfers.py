"""Copies between host and device that nobody waits for: through page-locked memory, in the current stream's order."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def copy_to(target: Tensor, array: np.ndarray) -> None:
    """Copy an array of the target's shape and dtype into it; the array may change right after."""
    source = torch.from_numpy(np.ascontiguousarray(array))
    if target.is_cuda:
        source = source.pin_memory()
    target.copy_(source, non_blocking=True)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor on the device."""
    tensor = torch.empty(array.shape, dtype=torch.from_numpy(array).dtype, device=device)
    copy_to(tensor, array)
    return tensor


class HostCopy:
    """A device tensor on its way to the host."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._tensor = tensor
        if tensor.is_cuda:
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> np.ndarray:
        """The values; waits until they are there."""
        if self._event is not None:
            self._event.synchronize()
        array: np.ndarray = self._tensor.numpy()
        return array
