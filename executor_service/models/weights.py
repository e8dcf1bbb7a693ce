"""Tensors from a checkpoint's safetensors files, brought to the device by several threads."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from torch import Tensor

from registry.errors import CheckpointError

NUM_READERS: Final = {"cpu": 1, "cuda": 8}
"""One reader alone is slower than the way to a GPU."""
CPU_AHEAD_BYTES: Final = 256 * 1024 * 1024
"""Read on a CPU before anybody has asked."""
Progress = Callable[[int, int], None]
"""Called with (bytes loaded, bytes in all)."""


class WeightReader:
    """Reads from the moment it is made; `tensors` gives each once.

    What nobody has taken yet is at most half of the GPU memory that is free at the beginning, and a tensor.
    """

    def __init__(self, model_dir: Path, device: torch.device) -> None:
        """CheckpointError if a file is missing."""
        self._device = device
        self._files = _weight_files(model_dir)
        self._opened = threading.local()
        self._turns = _Turns(torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else CPU_AHEAD_BYTES)
        self._pool = ThreadPoolExecutor(NUM_READERS[device.type], thread_name_prefix="weights")
        places = [(file, name) for file in self._files for name in _names_in(file)]
        self._pending: deque[tuple[str, Future[Tensor]]] = deque(
            (name, self._pool.submit(self._read, number, file, name)) for number, (file, name) in enumerate(places)
        )

    def tensors(self, progress: Progress) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of all files, in their order; whoever takes one alone has it."""
        done, total = 0, sum(file.stat().st_size for file in self._files)
        while self._pending:
            name, tensor = self._take()
            done += tensor.nbytes
            progress(done, total)
            yield name, tensor
        progress(total, total)

    def close(self) -> None:
        """Read no more."""
        self._turns.end()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _take(self) -> tuple[str, Tensor]:
        name, future = self._pending.popleft()
        tensor = future.result()
        self._turns.taken(tensor.nbytes)
        return name, tensor

    def _read(self, number: int, file: Path, name: str) -> Tensor:
        if getattr(self._opened, "path", None) != file:
            self._opened.path, self._opened.file = file, safe_open(file, framework="pt", device=str(self._device))
        self._turns.wait(number)
        tensor: Tensor = self._opened.file.get_tensor(name)
        self._turns.read(tensor.nbytes)
        return tensor


class _Turns:
    """Who may read: everybody while less than `limit` bytes wait to be taken, and always who is to be taken next."""

    def __init__(self, limit: int) -> None:
        self._changed = threading.Condition()
        self._limit: float = limit
        self._num_waiting_bytes = 0
        self._next = 0

    def wait(self, number: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: number <= self._next or self._num_waiting_bytes < self._limit)

    def read(self, num_bytes: int) -> None:
        with self._changed:
            self._num_waiting_bytes += num_bytes

    def taken(self, num_bytes: int) -> None:
        with self._changed:
            self._num_waiting_bytes -= num_bytes
            self._next += 1
            self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self._limit = float("inf")
            self._changed.notify_all()


def _names_in(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as weights:
        return list(weights.keys())


def _weight_files(model_dir: Path) -> list[Path]:
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        files = [model_dir / name for name in names]
    else:
        files = [model_dir / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{model_dir} lacks {file.name}; weights must be in safetensors files")
    return files
