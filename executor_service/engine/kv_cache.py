"""Size and memory of the paged KV cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from executor_service.engine.model_runner import ModelRunner
from executor_service.layers.context import KVCache
from executor_service.models.protocol import KVGeometry
from registry.errors import RegistryError


class KVCacheTooSmallError(RegistryError):
    """The memory does not hold even one request of the largest length."""


def block_bytes(geometry: KVGeometry, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, keys and values."""
    return 2 * geometry.num_layers * block_size * geometry.num_kv_heads * geometry.head_dim * dtype.itemsize


def default_kv_cache_bytes(max_num_seqs: int, max_model_len: int, block_size: int, bytes_per_block: int) -> int:
    """On CPU: what all requests at full length need, at most 1 GiB, and always enough for one."""
    blocks_per_request = -(-max_model_len // block_size)
    wanted = max_num_seqs * blocks_per_request * bytes_per_block
    return max(min(wanted, 1 << 30), blocks_per_request * bytes_per_block)


def num_blocks_in(budget: int, bytes_per_block: int, block_size: int, max_model_len: int) -> int:
    """Blocks that fit the budget; KVCacheTooSmallError says which limit to lower and to what."""
    blocks = max(budget, 0) // bytes_per_block
    needed = -(-max_model_len // block_size)
    if blocks < needed:
        remedy = f"lower --max-model-len to {blocks * block_size}" if blocks else "give it more memory"
        raise KVCacheTooSmallError(
            f"the KV cache has room for {blocks} blocks of {block_size} tokens ({budget} bytes), one request of "
            f"max_model_len {max_model_len} needs {needed} ({needed * bytes_per_block} bytes); {remedy} or raise "
            f"--kv-cache-memory to {needed * bytes_per_block}"
        )
    return blocks


def allocate_kv_caches(geometry: KVGeometry, num_blocks: int, runner: ModelRunner) -> Sequence[KVCache]:
    """Zeroed caches, one per layer: masked rows are multiplied by zero, so they must be finite."""
    shape = (num_blocks, runner.block_size, geometry.num_kv_heads, geometry.head_dim)
    return [
        KVCache(*(torch.zeros(shape, dtype=runner.dtype, device=runner.device) for _ in range(2)))
        for _ in range(geometry.num_layers)
    ]
