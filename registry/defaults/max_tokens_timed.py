"""The largest video and the largest audio: the search over what has a duration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from registry.context import InputContext
from registry.defaults.max_tokens import Layout, Score, find_largest_image, score_of
from registry.errors import InvalidHookError
from registry.frames import FrameSampling
from registry.layout import ItemLayout
from registry.media import MediaInfo

NUM_LENGTHS: Final = 64
"""Audio lengths that are tried, spread evenly up to the limit."""


def find_largest_video(ctx: InputContext, layout: Layout, score: Score) -> MediaInfo:
    """For each candidate number of frames the largest size; for the best of them every number of frames."""
    most = _max_frames(ctx)
    candidates = {1, 2, 3, most - 1, most, *(1 << exponent for exponent in range(10))}
    found = [_largest_of(ctx, layout, score, count) for count in sorted(candidates) if 1 <= count <= most]
    best = _best((info for info in found if info is not None), layout, score)
    return _best((MediaInfo.video(*best.size, count) for count in _frames_of(ctx, best, most)), layout, score)


def find_largest_audio(ctx: InputContext, layout: Layout, score: Score) -> MediaInfo:
    """The best of evenly spread lengths and what the extractor names, then hill-climbing to single samples."""
    rate = ctx.sampling_rate
    most = ctx.limits.max_samples(rate)

    def value(count: int) -> tuple[int, ...] | None:
        return score_of(layout, MediaInfo.audio(count, rate), score) if 1 <= count <= most else None

    best = max(_lengths(ctx, most), key=lambda count: (value(count) or (), -count))
    step = max(most // (2 * NUM_LENGTHS), 1)
    while step:
        better = [count for count in (best - step, best + step) if (value(count) or ()) > (value(best) or ())]
        best, step = (better[-1], step) if better else (best, step // 2)
    return _usable(MediaInfo.audio(best, rate), layout, score)


def _max_frames(ctx: InputContext) -> int:
    """What sampling can give: a fixed number of frames is never exceeded."""
    wanted = FrameSampling.of(ctx).num_frames
    return max(1, min(ctx.limits.max_video_frames, wanted or ctx.limits.max_video_frames))


def _largest_of(ctx: InputContext, layout: Layout, score: Score, num_frames: int) -> MediaInfo | None:
    """The largest size of that many frames; None if the family takes none."""

    def of_frames(info: MediaInfo) -> ItemLayout:
        return layout(MediaInfo.video(*info.size, num_frames))

    try:
        size = find_largest_image(ctx, of_frames, score, ctx.limits.max_video_pixels // num_frames).size
    except InvalidHookError:
        return None
    return MediaInfo.video(*size, num_frames)


def _frames_of(ctx: InputContext, info: MediaInfo, most: int) -> range:
    height, width = info.size
    return range(1, max(min(most, ctx.limits.max_video_pixels // (height * width)), 1) + 1)


def _best(candidates: Iterable[MediaInfo], layout: Layout, score: Score) -> MediaInfo:
    """The one that scores highest, the smallest of equals."""
    found = list(candidates)
    if not found:
        raise InvalidHookError("the layout takes no video within the limits")
    size: Callable[[MediaInfo], int] = lambda info: (info.height or 1) * (info.width or 1) * (info.num_frames or 1)  # noqa: E731
    return max(found, key=lambda info: (score_of(layout, info, score) or (), -size(info)))


def _lengths(ctx: InputContext, most: int) -> Iterator[int]:
    config = ctx.processor_config
    nested = config.get("feature_extractor")
    sources = [config, nested] if isinstance(nested, dict) else [config]
    rate = ctx.sampling_rate
    named = [source.get("n_samples") or (source.get("chunk_length") or 0) * rate for source in sources]
    spread = [most * part // NUM_LENGTHS for part in range(1, NUM_LENGTHS + 1)]
    for length in {1, rate, *(int(value) for value in named), *spread}:
        yield from (near for near in (length - 1, length, length + 1) if 1 <= near <= most)


def _usable(info: MediaInfo, layout: Layout, score: Score) -> MediaInfo:
    if score_of(layout, info, score) is None:
        raise InvalidHookError(f"the layout takes no {info.modality} within the limits")
    return info
