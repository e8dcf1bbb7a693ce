"""Size and memory of the paged KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import torch

from executor_service.engine.limits import EngineLimits
from executor_service.engine.memory import DeviceMemory
from executor_service.engine.model_runner import ModelRunner
from executor_service.layers.context import KVCache
from executor_service.models.protocol import KVGeometry
from registry.errors import RegistryError

if TYPE_CHECKING:
    from executor_service.engine.profiling import MemoryPeaks


SLACK_BYTES: Final = 128 * 1024 * 1024
"""For what torch's allocator loses between tensors of changing sizes."""


class KVCacheTooSmallError(RegistryError):
    """The memory does not hold even one request of the largest length."""


def block_bytes(geometry: KVGeometry, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, keys and values."""
    return 2 * geometry.num_layers * block_size * geometry.num_kv_heads * geometry.head_dim * dtype.itemsize


def default_kv_cache_bytes(limits: EngineLimits, bytes_per_block: int) -> int:
    """On CPU: what all requests at full length need, at most 1 GiB, and always enough for one."""
    blocks_per_request = limits.max_num_blocks_per_request
    wanted = limits.max_num_seqs * blocks_per_request * bytes_per_block
    return max(min(wanted, 1 << 30), blocks_per_request * bytes_per_block)


def num_blocks_in(budget: int, bytes_per_block: int, limits: EngineLimits, flag: str) -> int:
    """Blocks that fit the budget; KVCacheTooSmallError says which limit to lower and to what, or `flag` to change."""
    blocks, block_size, max_model_len = max(budget, 0) // bytes_per_block, limits.block_size, limits.max_model_len
    needed = limits.max_num_blocks_per_request
    if blocks < needed:
        remedy = f"lower --max-model-len to {blocks * block_size}" if blocks else "give it more memory"
        raise KVCacheTooSmallError(
            f"the KV cache has room for {blocks} blocks of {block_size} tokens ({budget} bytes), one request of "
            f"max_model_len {max_model_len} needs {needed} ({needed * bytes_per_block} bytes); {remedy} or {flag}"
        )
    return blocks


class GpuShareTakenError(RegistryError):
    """The share of the GPU that the executor was promised is not free."""


def device_bytes_beside(memory: DeviceMemory, encoder_cache_bytes: int) -> int:
    """What a GPU's share holds besides weights, peaks, graphs and the KV cache: context, libraries, kept features."""
    return memory.own_bytes_beside_torch + encoder_cache_bytes + SLACK_BYTES


def device_kv_cache_bytes(memory: DeviceMemory, utilization: float, peaks: MemoryPeaks, other: int) -> int:
    """What a GPU's share has left for the KV cache: share - peak of torch's allocator - graphs - `other`.

    GpuShareTakenError says who holds what.
    """
    share = int(memory.total_bytes * utilization)
    torch.cuda.empty_cache()
    own, free = memory.own_bytes, memory.free_bytes
    if own + free < share:
        raise GpuShareTakenError(
            f"--gpu-memory-utilization {utilization:g} asks for {share} of the GPU's {memory.total_bytes} bytes: this "
            f"process has {own}, others have {memory.total_bytes - own - free}, and only {free} are free; lower it to "
            f"{(own + free) / memory.total_bytes:.2f} or stop the others"
        )
    return share - peaks.reserved - peaks.graphs - other


def allocate_kv_caches(geometry: KVGeometry, num_blocks: int, runner: ModelRunner) -> Sequence[KVCache]:
    """Zeroed caches, one per layer: masked rows are multiplied by zero, so they must be finite."""
    shape = (num_blocks, runner.limits.block_size, geometry.num_kv_heads, geometry.head_dim)
    return [
        KVCache(*(torch.zeros(shape, dtype=runner.dtype, device=runner.device) for _ in range(2)))
        for _ in range(geometry.num_layers)
    ]
