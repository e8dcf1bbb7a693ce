"""What a block of the prefix cache is known by: everything that its keys and values depend on.

The digest of block i is SHA-256 over the digest of block i - 1, the block's token ids, and for each media item
that reaches into it the item's content digest and where in the item the block begins. Placeholder tokens of two
pictures are equal; the content digests are not. Tokens of a bidirectional span depend on what comes later in it, so its
extent and its token ids count with every block that it reaches into: such a block is right for whoever shares it, also
without the rest of the span.
"""

from __future__ import annotations

import hashlib

from executor_service.engine.request import Request


def extend_digests(request: Request, block_size: int, num_blocks: int) -> None:
    """Compute `request.block_digests` up to `num_blocks`, all of whose tokens are known."""
    digests = request.block_digests
    for index in range(len(digests), num_blocks):
        begin, end = index * block_size, (index + 1) * block_size
        hasher = hashlib.sha256(digests[-1] if digests else b"")
        hasher.update(request.token_ids[begin:end].astype("<i8").tobytes())
        for item in request.items_between(begin, end):
            assert item.content_digest is not None
            hasher.update(item.content_digest)
            hasher.update((begin - item.placeholder.offset).to_bytes(8, "little", signed=True))
        for first, last in request.spans_between(begin, end):
            hasher.update(b"".join((place - begin).to_bytes(8, "little", signed=True) for place in (first, last)))
            hasher.update(request.token_ids[first:last].astype("<i8").tobytes())
        digests.append(hasher.digest())
