"""What one step may hold at the most: everything that is allocated, profiled or captured in advance follows from it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineLimits:
    """Tokens, requests, encoder features of one step; `max_model_len` tokens per request, in blocks of `block_size`."""

    max_num_batched_tokens: int
    max_num_seqs: int
    max_num_encoder_tokens: int
    max_model_len: int
    block_size: int

    @property
    def max_num_tokens(self) -> int:
        """Rows of the largest flattened batch, a padded one included."""
        return max(self.max_num_batched_tokens, self.max_num_seqs)

    @property
    def max_num_blocks_per_request(self) -> int:
        """Columns of the widest block table."""
        return -(-self.max_model_len // self.block_size)
