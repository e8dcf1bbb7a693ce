"""Default maximum tokens: a search over the layout, on header facts alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain, product
from typing import Any

from registry.context import InputContext
from registry.errors import MissingHookError
from registry.layout import ItemLayout
from registry.media import MediaInfo

Score = Callable[[ItemLayout], tuple[int, ...]]
"""What is to be largest, and behind it what decides between equals."""


def find_largest_image(ctx: InputContext, layout: Callable[[MediaInfo], ItemLayout], score: Score) -> MediaInfo:
    """The image size whose layout scores highest, among candidates and what hill-climbing finds from the best."""
    sides = candidate_sides(ctx)
    sizes = chain(product(sides, sides), _sizes_at_pixel_limit(ctx))
    scored = {size: score(layout(MediaInfo.image(*size))) for size in sizes if _is_allowed(ctx, size)}
    best = max(scored, key=lambda size: (scored[size], -size[0] * size[1]))
    return MediaInfo.image(*_climb(ctx, best, lambda size: score(layout(MediaInfo.image(*size)))))


def find_largest(
    ctx: InputContext, modality: str, layout: Callable[[MediaInfo], ItemLayout], score: Score
) -> MediaInfo:
    """The media facts with the highest score; MissingHookError for a modality without a search."""
    if modality != "image":
        raise MissingHookError(
            f"{ctx.architecture}: the maximum {modality} tokens cannot be searched for; register a number or a function"
        )
    return find_largest_image(ctx, layout, score)


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


def _sizes_at_pixel_limit(ctx: InputContext) -> Iterator[tuple[int, int]]:
    """For each height the widest image; where the pixel limit binds, no pair of candidates need be near the best."""
    side, pixels = ctx.limits.max_image_side, ctx.limits.max_image_pixels
    if pixels < side * side:
        yield from ((height, min(side, pixels // height)) for height in range(1, side + 1))


def _is_allowed(ctx: InputContext, size: tuple[int, int]) -> bool:
    height, width = size
    side, pixels = ctx.limits.max_image_side, ctx.limits.max_image_pixels
    return 1 <= height <= side and 1 <= width <= side and height * width <= pixels


def _climb(
    ctx: InputContext, start: tuple[int, int], score: Callable[[tuple[int, int]], tuple[int, ...]]
) -> tuple[int, int]:
    """Move to better neighbours, in steps from large to one pixel, until none is better."""
    best, best_score = start, score(start)
    step = 64
    while step >= 1:
        steps = [(best[0] + dy * step, best[1] + dx * step) for dy, dx in product((-1, 0, 1), repeat=2)]
        scored = [(score(size), size) for size in steps if _is_allowed(ctx, size)]
        top_score, top = max(scored)
        if top_score > best_score:
            best, best_score = top, top_score
        else:
            step //= 2
    return best
