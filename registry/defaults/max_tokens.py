"""Default maximum tokens: a search over the layout, on header facts alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

from registry.context import InputContext
from registry.errors import InvalidHookError, MediaError
from registry.layout import ItemLayout
from registry.media import MediaInfo

Size = tuple[int, int]
"""(height, width) in pixels."""
Score = Callable[[ItemLayout], tuple[int, ...]]
"""What is to be largest, and behind it what decides between equals."""


Layout = Callable[[MediaInfo], ItemLayout]


def find_largest(ctx: InputContext, modality: str, layout: Layout, score: Score) -> MediaInfo:
    """The media facts within the limits with the highest score."""
    from registry.defaults.max_tokens_timed import find_largest_audio, find_largest_video

    searches = {"image": find_largest_image, "video": find_largest_video, "audio": find_largest_audio}
    return searches[modality](ctx, layout, score)


def find_largest_image(ctx: InputContext, layout: Layout, score: Score, max_pixels: int | None = None) -> MediaInfo:
    """The image size whose layout scores highest, among candidates and what hill-climbing finds from the best.

    `max_pixels` is a stricter limit than that of the context.
    """
    sides = candidate_sides(ctx)
    bounds = _Bounds(
        ctx.limits.max_image_side, min(ctx.limits.max_image_pixels, max_pixels or ctx.limits.max_image_pixels)
    )

    def value(size: Size) -> tuple[int, ...] | None:
        return score_of(layout, MediaInfo.image(*size), score) if bounds.allow(size) else None

    sizes = chain(product(sides, sides), bounds.sizes_at_pixel_limit())
    scored = {size: found for size in sizes if (found := value(size)) is not None}
    if not scored:
        raise InvalidHookError("the layout takes no picture within the limits")
    best = max(scored, key=lambda size: (scored[size], -size[0] * size[1]))
    return MediaInfo.image(*_climb(best, value))


def score_of(layout: Layout, info: MediaInfo, score: Score) -> tuple[int, ...] | None:
    """The score of an item; None if the family cannot take it."""
    try:
        return score(layout(info))
    except MediaError:
        return None


def candidate_sides(ctx: InputContext) -> list[int]:
    """Side lengths worth trying: 1, 2, powers of two, and every size the processor names, each +- 1."""
    named = {value + delta for value in _numbers(_sizes_of(ctx)) for delta in (-1, 0, 1)}
    powers = {1 << exponent for exponent in range(14)}
    sides = {1, 2, ctx.limits.max_image_side} | named | powers
    return sorted(side for side in sides if 1 <= side <= ctx.limits.max_image_side)


def _sizes_of(ctx: InputContext) -> Any:
    config = ctx.processor_config
    nested = config.get("image_processor")
    sources: list[Mapping[str, Any]] = [config, nested] if isinstance(nested, dict) else [config]
    keys = ("size", "crop_size", "image_grid_pinpoints", "pad_size")
    grid = getattr(ctx.model_config, "image_grid_pinpoints", None)
    return [[source.get(key) for source in sources for key in keys], grid]


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _numbers(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner)


@dataclass(frozen=True)
class _Bounds:
    side: int
    pixels: int

    def allow(self, size: Size) -> bool:
        height, width = size
        return 1 <= height <= self.side and 1 <= width <= self.side and height * width <= self.pixels

    def sizes_at_pixel_limit(self) -> Iterator[Size]:
        """For each height the widest image; where the pixel limit binds, no pair of candidates need be near it."""
        if self.pixels < self.side * self.side:
            yield from ((height, min(self.side, self.pixels // height)) for height in range(1, self.side + 1))


def _climb(start: Size, score: Callable[[Size], tuple[int, ...] | None]) -> Size:
    """Move to better neighbours, in steps from large to one pixel, until none is better."""
    best, best_score = start, score(start) or ()
    step = 64
    while step >= 1:
        steps = [(best[0] + dy * step, best[1] + dx * step) for dy, dx in product((-1, 0, 1), repeat=2)]
        top_score, top = max((found, size) for size in steps if (found := score(size)) is not None)
        if top_score > best_score:
            best, best_score = top, top_score
        else:
            step //= 2
    return best
