"""Blocks of the paged KV cache: who uses which, and which hold a prefix that another request may share.

A block that has been computed to its end is registered under the digest of everything up to its end
(`prefix_digests`). Blocks without users stay registered until they are needed for something else, least
recently used first and a prefix's end before its beginning.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from executor_service.engine.prefix_digests import extend_digests
from executor_service.engine.request import Request


class IntegrityError(AssertionError):
    """A resource is not whole: leaked, used twice, or counted wrongly."""


class BlockManager:
    """Hands out blocks of `block_size` tokens; every block is free or used by one request, or several by prefix."""

    def __init__(self, num_blocks: int, block_size: int, shares_prefixes: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.shares_prefixes = shares_prefixes
        self._num_users = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def num_used_blocks(self) -> int:
        """Blocks in use."""
        return self.num_blocks - len(self._free)

    @property
    def num_registered_blocks(self) -> int:
        """Blocks that hold a prefix, used or not."""
        return len(self._digest_of)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens fill."""
        return -(-num_tokens // self.block_size)

    def reserve(self, request: Request, num_tokens: int) -> bool:
        """Give the request blocks for its first `num_tokens` tokens; False, changing nothing, if too few are free."""
        missing = self.num_blocks_for(num_tokens) - len(request.block_table)
        if missing <= 0:
            return True
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block, _ = self._free.popitem(last=False)
            self._unregister(block)
            self._num_users[block] = 1
            request.block_table.append(block)
        return True

    def free(self, request: Request) -> None:
        """Take all blocks of the request back."""
        for block in reversed(request.block_table):
            self._num_users[block] -= 1
            if not self._num_users[block]:
                self._free[block] = None
                if block not in self._digest_of:
                    self._free.move_to_end(block, last=False)
        del request.block_table[:]
        request.num_registered_blocks = 0

    # --- prefixes -----------------------------------------------------------------------------------

    def share_prefix(self, request: Request) -> int:
        """Give a request without blocks the longest registered prefix; returns its tokens, less than all it has."""
        if not (self.shares_prefixes and request.shares_prefix):
            return 0
        usable = (request.num_tokens - 1) // self.block_size
        extend_digests(request, self.block_size, usable)
        for digest in request.block_digests[:usable]:
            block = self._block_of.get(digest)
            if block is None:
                break
            self._free.pop(block, None)
            self._num_users[block] += 1
            request.block_table.append(block)
        request.num_registered_blocks = len(request.block_table)
        return len(request.block_table) * self.block_size

    def register(self, request: Request) -> None:
        """Note the request's blocks that have been computed to their end; what is already registered stays so.

        A block with a token that is still in flight is noted when the token is known.
        """
        full = min(request.num_computed_tokens, request.num_tokens) // self.block_size
        if full <= request.num_registered_blocks or not (self.shares_prefixes and request.is_shareable):
            return
        extend_digests(request, self.block_size, full)
        for index in range(request.num_registered_blocks, full):
            block, digest = request.block_table[index], request.block_digests[index]
            if digest not in self._block_of:
                self._block_of[digest] = block
                self._digest_of[block] = digest
        request.num_registered_blocks = full

    def _unregister(self, block: int) -> None:
        if (digest := self._digest_of.pop(block, None)) is not None:
            del self._block_of[digest]

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """IntegrityError unless every block is free or used as often as counted, and tables cover what was computed."""
        requests = list(requests)
        users = Counter(block for request in requests for block in request.block_table)
        counted = {block: count for block, count in enumerate(self._num_users) if count}
        num_places = len(self._free) + len(counted)
        if users != counted or num_places != self.num_blocks or not self._free.keys().isdisjoint(counted):
            raise IntegrityError(self._describe_fault(users))
        if {digest: block for block, digest in self._digest_of.items()} != self._block_of:
            raise IntegrityError("registered prefixes and their blocks disagree")
        for request in requests:
            self._check_table(request)

    def _describe_fault(self, users: Counter[int]) -> str:
        for block in sorted({*users, *range(self.num_blocks)}):
            counted = self._num_users[block] if block < self.num_blocks else None
            if users[block] != counted or (block in self._free) != (counted == 0):
                place = "free" if block in self._free else "not free"
                return f"KV block {block} has {users[block]} users, {counted} are counted, and it is {place}"
        return f"the free list has {len(self._free)} blocks, which is not what is left"

    def _check_table(self, request: Request) -> None:
        if len(request.block_table) < self.num_blocks_for(request.num_computed_tokens):
            raise IntegrityError(f"request {request.request_id} has computed more tokens than its blocks hold")
        if len(set(request.block_table)) != len(request.block_table):
            raise IntegrityError(f"request {request.request_id} has a block twice")
        first_own = request.num_computed_tokens // self.block_size
        for block in request.block_table[first_own:]:
            if self._num_users[block] > 1 or block in self._digest_of:
                raise IntegrityError(f"request {request.request_id} writes to block {block}, which is shared")
