"""What a GPU's share leaves for the KV cache: the arithmetic, without a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from executor_service.engine.kv_cache import GpuShareTakenError, device_kv_cache_bytes
from executor_service.engine.memory import HostMemory
from executor_service.engine.profiling import MemoryPeaks, profile_run
from executor_service.models.protocol import kv_geometry
from tests.executor_service.conftest import boot_engine

PEAKS = MemoryPeaks(vision=30, language=50, graphs=20, reserved=400)


def gpu(own: int, free: int) -> SimpleNamespace:
    return SimpleNamespace(total_bytes=1000, own_bytes=own, free_bytes=free)


def test_what_is_left() -> None:
    """share - reserved - graphs - other; vision and language are in what was reserved."""
    assert device_kv_cache_bytes(gpu(own=450, free=550), 0.9, PEAKS, other=100) == 900 - 400 - 20 - 100


def test_a_share_that_others_hold() -> None:
    with pytest.raises(GpuShareTakenError, match=r"asks for 900 of the GPU's 1000 bytes: this process has 450, others "
                       r"have 250, and only 300 are free; lower it to 0.75 or stop the others"):  # fmt: skip
        device_kv_cache_bytes(gpu(own=450, free=300), 0.9, PEAKS, other=100)


class ScriptedMemory(HostMemory):
    """An allocator that had `encoding` bytes for the encoder, and `computing` beside the scratch cache behind it."""

    def __init__(self, encoding: int, computing: int) -> None:
        super().__init__()
        self.runner: object = None
        self._encoding, self._computing = encoding, computing

    def reserved_peak_bytes(self) -> int:
        caches = self.runner.kv_caches
        scratch = sum(cache.keys.nbytes + cache.values.nbytes for cache in caches)
        return scratch + self._computing if caches else self._encoding


@pytest.mark.parametrize(("encoding", "computing"), [(100, 900), (900, 100)])
def test_the_scratch_cache_of_the_profile_is_in_no_peak(checkpoint, encoding: int, computing: int) -> None:
    booted = boot_engine(checkpoint)
    runner, memory = booted.engine.runner, ScriptedMemory(encoding, computing)
    runner.kv_caches, memory.runner = (), runner
    geometry = kv_geometry(runner.model, booted.family.ctx.text_config)
    peaks = profile_run(booted.family, runner, geometry, memory, num_graphs=0)
    assert peaks.reserved == 900
    assert runner.kv_caches == ()
