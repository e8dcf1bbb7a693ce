"""Engines on the GPU for tests: small, float32 unless a test says otherwise; they prove their queues every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from executor_service.engine.boot import BootedEngine
from tests.executor_service.conftest import Bench, boot_engine

KV_CACHE_BYTES = 1 << 26
MAX_NUM_SEQS = 24
SHARE = 0.2
"""Little, so that tests may run beside each other."""

VARIANTS = {
    "fused": {"decoder": "fused"},
    "fused without graphs": {"decoder": "fused", "cuda_graphs": False},
    "fused, one step after the other": {"decoder": "fused", "cuda_graphs": False, "async_scheduling": "off"},
    "stock": {"decoder": "stock"},
    "stock, one step after the other": {"decoder": "stock", "cuda_graphs": False, "async_scheduling": "off"},
}
"""Every path a token can take through the engine."""


def boot_on_gpu(checkpoint: Path, **config: Any) -> BootedEngine:
    """As `boot_engine`; `kv_cache_memory=None` sizes the cache by the profile."""
    settings = {
        "dtype": "float32", "kv_cache_memory": KV_CACHE_BYTES, "max_num_seqs": MAX_NUM_SEQS,
        "gpu_memory_utilization": SHARE,
    }  # fmt: skip
    return boot_engine(checkpoint, **{**settings, "device": "cuda", **config})


def gpu_bench(checkpoint: Path, reference: Any, **config: Any) -> Bench:
    """An engine on the GPU beside transformers on the CPU in float64."""
    return Bench(checkpoint, boot_on_gpu(checkpoint, **config), reference)
