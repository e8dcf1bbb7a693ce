"""The items a family is tried with: header facts by the thousand for layouts, noise for mappers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Final

import numpy as np
from PIL import Image

from registry.context import InputContext
from registry.defaults.max_tokens import candidate_sides
from registry.errors import MediaError
from registry.frames import FrameSampling
from registry.layout import ItemLayout
from registry.media import MediaInfo, MediaItem

PRIMES: Final = (3, 5, 7, 13, 31, 97, 101, 251, 337, 499, 673, 1009, 2017, 4093, 8191)
NUM_RANDOM_SIZES: Final = 1500
NUM_RANDOM_LENGTHS: Final = 200
NUM_FRAMES: Final = (1, 2, 3, 4, 7, 8, 16, 31, 32)
NUM_NOISE: Final = 65521
MAX_MAPPED_PIXELS: Final = 1 << 20
"""Pictures above this are laid out and, but for a few, not mapped: a check is to take seconds."""
LARGE_PICTURES: Final = ((8192, 1), (1, 8192), (1080, 1920), (3000, 4000))
"""(height, width) of pictures that are always mapped: the longest, a screen's and a camera's."""


def probe_infos(ctx: InputContext, modality: str) -> list[MediaInfo]:
    """Facts within the limits, the smallest first: edges of what the processor names, primes, extremes, chance."""
    makers = {"image": _images, "video": _videos, "audio": _audio}
    allowed = (info for info in dict.fromkeys(makers[modality](ctx)) if _is_allowed(ctx, info))
    return sorted(allowed, key=num_elements)


def describe(info: MediaInfo) -> str:
    """An item in a message: `image 480x640` (height and width), `audio of 400 samples`."""
    if info.modality == "audio":
        return f"audio of {info.num_samples} samples"
    size = f"{info.height}x{info.width}"
    return f"{info.modality} {size}" if info.modality == "image" else f"video of {info.num_frames} frames {size}"


def num_elements(info: MediaInfo) -> int:
    """Pixels or samples."""
    return (info.height or 1) * (info.width or 1) * (info.num_frames or 1) * (info.num_samples or 1)


def noise_item(info: MediaInfo, seed: int = 0) -> MediaItem:
    """An item in which no two places are alike."""
    if info.modality == "audio":
        samples = np.random.default_rng(seed).standard_normal(info.num_samples or 0)
        return MediaItem(info, (0.1 * samples).astype(np.float32))
    frames = [_noise_picture(*info.size, seed + index) for index in range(info.num_frames or 1)]
    return MediaItem(info, frames if info.modality == "video" else frames[0])


def _noise_picture(height: int, width: int, seed: int) -> Image.Image:
    """Noise that repeats only after a prime number of values: no two rows are alike, and large ones are quick."""
    noise = np.random.default_rng(seed).integers(0, 256, NUM_NOISE, dtype=np.uint8)
    return Image.fromarray(np.resize(noise, (height, width, 3)))


def representatives(probes: Sequence[tuple[MediaInfo, ItemLayout]]) -> list[MediaInfo]:
    """Items worth mapping and encoding, the most telling first.

    Corners; then the smallest item of each kind of layout, rare kinds first, because an exception shows in
    few sizes; then every side once as a height and once as a width.
    """
    small = [(info, layout) for info, layout in probes if num_elements(info) <= MAX_MAPPED_PIXELS]
    groups: dict[object, list[MediaInfo]] = {}
    for info, layout in small:
        groups.setdefault(_kind(layout), []).append(info)
    smallest = [infos[0] for infos in groups.values()]
    first = [smallest[index] for index in np.random.default_rng(0).permutation(len(smallest))]
    sizes = {info: len(groups[_kind(layout)]) for info, layout in small}
    rare = sorted(first, key=lambda info: sizes[info])
    infos = [info for info, _ in small]
    corners = [infos[0], infos[len(infos) // 2], infos[-1]] if infos else []
    return list(dict.fromkeys([*corners, *rare[:32], *_every_side_once(infos), *rare[32:]]))


def large_pictures(probes: Sequence[tuple[MediaInfo, ItemLayout]]) -> list[MediaInfo]:
    """Those of the large pictures that the limits and the family allow."""
    return [info for info, _ in probes if info.modality == "image" and info.size in LARGE_PICTURES]


def _kind(layout: ItemLayout) -> object:
    shapes = tuple((name, spec.dtype, spec.shape) for name, spec in layout.tensors.items())
    return layout.num_tokens, layout.length, shapes


def _every_side_once(infos: Iterable[MediaInfo]) -> Iterator[MediaInfo]:
    heights: set[int | None] = set()
    widths: set[int | None] = set()
    for info in infos:
        if info.height not in heights and info.width not in widths and min(info.height or 1, info.width or 1) > 2:
            heights.add(info.height)
            widths.add(info.width)
            yield info


def _is_allowed(ctx: InputContext, info: MediaInfo) -> bool:
    try:
        ctx.limits.check_size(info)
    except MediaError:
        return False
    return True


def _images(ctx: InputContext) -> Iterator[MediaInfo]:
    sides = sorted({*candidate_sides(ctx), *PRIMES})
    yield from (MediaInfo.image(height, width) for height, width in product(sides, sides))
    yield from (MediaInfo.image(*size) for size in LARGE_PICTURES)
    yield from (MediaInfo.image(*size) for size in _random_sizes(ctx.limits.max_image_side))


def _random_sizes(max_side: int) -> Iterator[tuple[int, int]]:
    """As many small sides as large ones, the same on every run."""
    exponents = np.random.default_rng(1).uniform(0, np.log(max_side), (NUM_RANDOM_SIZES, 2))
    yield from ((height, width) for height, width in np.exp(exponents).round().astype(int).tolist())


def _videos(ctx: InputContext) -> Iterator[MediaInfo]:
    sides = sorted({*candidate_sides(ctx), 3, 97})
    most = FrameSampling.of(ctx).num_frames or ctx.limits.max_video_frames
    counts = sorted({most, *(count for count in NUM_FRAMES if count <= most)})
    for count, (height, width) in product(counts, zip(sides, reversed(sides), strict=True)):
        yield MediaInfo.video(height, width, count)
        yield MediaInfo.video(min(height, width), min(height, width), count)


def _audio(ctx: InputContext) -> Iterator[MediaInfo]:
    rate = ctx.sampling_rate
    most = ctx.limits.max_samples(rate)
    chance = np.exp(np.random.default_rng(2).uniform(0, np.log(most), NUM_RANDOM_LENGTHS)).round().astype(int).tolist()
    named = (1, 160, 400, rate, 30 * rate, most, *PRIMES)
    lengths = {near for length in named for near in (length - 1, length, length + 1)}
    yield from (MediaInfo.audio(length, rate) for length in {*lengths, *chance} if length > 0)
