"""Layers over the kernels: attention on the paged KV cache, and the context it reads."""

from executor_service.layers.attention import Attention, paged_attention_interface
from executor_service.layers.context import AttentionMetadata, KVCache, forward_context

__all__ = ["Attention", "AttentionMetadata", "KVCache", "forward_context", "paged_attention_interface"]
