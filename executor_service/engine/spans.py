"""Bidirectional spans: tokens that all see each other, so that none can be computed before the others are there.

A span lies within one media item. So the chunks that encoding allows, which end between items, cut none, and the item's
content is all that the span's features depend on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from executor_service.engine.request import EngineItem, Span
from registry.errors import CheckpointError, InvalidHookError


def checked_spans(found: Iterable[Span], items: Sequence[EngineItem], max_num_batched_tokens: int) -> tuple[Span, ...]:
    """What a model says, as the engine relies on it; an error if it cannot, or if a step is too small for a span."""
    spans = tuple((int(begin), int(end)) for begin, end in found)
    places = [item.placeholder for item in items]
    last = 0
    for begin, end in spans:
        if not last <= begin < end or not any(place.offset <= begin and end <= place.end for place in places):
            ranges = ", ".join(f"{place.offset} to {place.end}" for place in places)
            raise InvalidHookError(
                f"bidirectional_spans has {begin} to {end}: spans are to be in order, and each within one item's "
                f"placeholder range ({ranges})"
            )
        if end - begin > max_num_batched_tokens:
            raise CheckpointError(
                f"{end - begin} tokens of an item see each other and must be computed in one step, "
                f"--max-num-batched-tokens is {max_num_batched_tokens}; raise it to {end - begin}"
            )
        last = end
    return spans
