"""Blocks of the paged KV cache: who has which."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

from executor_service.engine.request import Request


class IntegrityError(AssertionError):
    """A resource is not whole: leaked, used twice, or counted wrongly."""


class BlockManager:
    """Hands out blocks of `block_size` tokens; every block is free or belongs to one request."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free: deque[int] = deque(range(num_blocks))

    @property
    def num_free_blocks(self) -> int:
        """Blocks nobody uses."""
        return len(self._free)

    @property
    def num_used_blocks(self) -> int:
        """Blocks in use."""
        return self.num_blocks - len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens fill."""
        return -(-num_tokens // self.block_size)

    def reserve(self, request: Request, num_tokens: int) -> bool:
        """Give the request blocks for its first `num_tokens` tokens; False, changing nothing, if too few are free."""
        missing = self.num_blocks_for(num_tokens) - len(request.block_table)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            request.block_table.append(self._free.popleft())
        return True

    def free(self, request: Request) -> None:
        """Take all blocks of the request back, the last one first to be reused."""
        self._free.extendleft(request.block_table)
        request.block_table.clear()

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """IntegrityError unless every block is free once or owned once, and tables cover what was computed."""
        owners = Counter(block for request in requests for block in request.block_table)
        places = owners + Counter(self._free)
        if set(places) != set(range(self.num_blocks)) or any(count != 1 for count in places.values()):
            lost = sorted(set(range(self.num_blocks)) - set(places))[:5]
            twice = sorted(block for block, count in places.items() if count > 1)[:5]
            raise IntegrityError(f"KV blocks are not whole: lost {lost}, used twice {twice}")
        for request in requests:
            if len(request.block_table) < self.num_blocks_for(request.num_computed_tokens):
                raise IntegrityError(f"request {request.request_id} has computed more tokens than its blocks hold")
