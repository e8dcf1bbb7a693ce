"""What a family does on a checkpoint, as a digest: services that would disagree refuse each other.

The digest covers behaviour (token ids, shapes, pixels), never source text or library versions. Float
mapper outputs differ in their last bits between library versions, so they travel as probe values that
are compared with a tolerance.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, Final

import numpy as np
from PIL import Image

from registry.errors import MediaError
from registry.family import ModelFamily
from registry.layout import WIRE_DTYPES, ItemLayout
from registry.media import MediaInfo, MediaItem

CONTRACT_VERSION: Final = 1
PROBE_TOLERANCE: Final = 1e-3
NUM_PROBES: Final = 64
FIXED_SIDES: Final = (1, 28, 97, 336, 500, 672, 1000, 2048)
"""Every (height, width) pair of these sides is laid out: 64 sizes."""
FIXED_PICTURES: Final = ((30, 40), (300, 200), (17, 500))
"""(height, width) of the pictures that are mapped."""
FIXED_FRAMES: Final = (1, 2, 3, 4, 8, 16, 31)
FIXED_SAMPLES: Final = (1, 2, 399, 400, 1000, 1600, 15_999, 16_000, 40_000, 160_000, 480_000, 480_001, 1_000_000)
FIXED_SECONDS: Final = (0.3, 1.7)
PROBE_TEXTS: Final = ("Diptych: what is in the picture?", " déjà vu, 図 1 — 42 %\n", "USER: a b  c ASSISTANT:")

CALLERS_SETTINGS: Final = ("padding", "truncation", "version")
"""What a serialized tokenizer holds beside its rules."""


@dataclass(frozen=True)
class Fingerprint:
    """`digest` is SHA-256 over `parts`, the SHA-256 of each named part; `probes` are compared at 1e-3."""

    digest: bytes
    parts: Mapping[str, bytes]
    probes: tuple[float, ...] = field(default=())

    def differences(self, other: Fingerprint) -> list[str]:
        """Names of what differs, empty if the two agree."""
        names = sorted(self.parts.keys() | other.parts.keys())
        found = [name for name in names if self.parts.get(name) != other.parts.get(name)]
        if not self._probes_agree(other):
            found.append("float mapper output")
        return found

    def _probes_agree(self, other: Fingerprint) -> bool:
        if len(self.probes) != len(other.probes):
            return False
        return all(abs(a - b) <= PROBE_TOLERANCE for a, b in zip(self.probes, other.probes, strict=True))


def fingerprint(family: ModelFamily) -> Fingerprint:
    """The fingerprint of a family on its checkpoint.

    Videos and audio have parts of their own, so that those of a family for pictures do not depend on them.
    """
    pixels, probes = _mapper_part(family, "image")
    parts = {
        "architecture": _digest(family.ctx.architecture),
        "contract version": _digest(CONTRACT_VERSION),
        "wire dtypes": _digest(dict(WIRE_DTYPES)),
        "tokenizer": _tokenizer_part(family),
        "item layout": _layout_part(family, "image"),
        "input mapper": pixels,
    }
    for modality in sorted({"video", "audio"} & set(family.modalities)):
        parts[f"{modality} layout"] = _layout_part(family, modality)
        parts[f"{modality} mapper"], more = _mapper_part(family, modality)
        probes += more
    whole = hashlib.sha256(b"".join(parts[name] for name in sorted(parts))).digest()
    return Fingerprint(whole, parts, probes)


def _digest(value: object) -> bytes:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()


def _tokenizer_part(family: ModelFamily) -> bytes:
    tokenizer = family.ctx.tokenizer
    encoded = [tokenizer.encode(text) for text in PROBE_TEXTS]
    placeholders = sorted(family.modality_of_placeholder.items())
    return _digest([_rules(tokenizer), encoded, placeholders])


def _rules(tokenizer: Any) -> dict[str, Any]:
    """All that tells texts and ids apart: vocabulary, merges, normalizer, added tokens and their flags.

    No text is needed to show a difference in them. Padding and truncation are what a caller last asked for.
    """
    parts: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return {name: part for name, part in parts.items() if name not in CALLERS_SETTINGS}


def _layout_part(family: ModelFamily, modality: str) -> bytes:
    if not family.has_layout(modality):
        return _digest(sorted(family.modalities))
    return _digest([_describe_item(family, info) for info in fixed_facts(family, modality)])


def fixed_facts(family: ModelFamily, modality: str) -> list[MediaInfo]:
    """What is laid out: 64 sizes, as pictures or with the numbers of frames in turn, or lengths of audio."""
    if modality == "audio":
        rate = family.ctx.sampling_rate
        return [MediaInfo.audio(num_samples, rate) for num_samples in FIXED_SAMPLES]
    sizes = [(height, width) for height in FIXED_SIDES for width in FIXED_SIDES]
    if modality == "image":
        return [MediaInfo.image(*size) for size in sizes]
    return [MediaInfo.video(*size, count, 2.0) for size, count in zip(sizes, cycle(FIXED_FRAMES), strict=False)]


def _describe_item(family: ModelFamily, info: MediaInfo) -> object:
    """The layout, or that there is none: families refuse what is too short or too small."""
    try:
        return _describe(family.layout(info))
    except MediaError:
        return None


def _describe(layout: ItemLayout) -> object:
    return [
        [[run.token_id, run.count, run.is_feature] for run in layout.replacement],
        [[name, spec.dtype, list(spec.shape)] for name, spec in sorted(layout.tensors.items())],
        [[name, array.dtype.name, array.tolist()] for name, array in sorted(layout.constants.items())],
    ]


def _mapper_part(family: ModelFamily, modality: str) -> tuple[bytes, tuple[float, ...]]:
    """Digest over the integer tensors of the fixed items, and probes from the float ones."""
    if modality not in family.modalities:
        return _digest(None), ()
    hasher, floats = hashlib.sha256(), []
    for item in fixed_items(family, modality):
        try:
            mapped = family.map_item(item)
        except MediaError:
            continue
        for name, array in sorted(mapped.items()):
            hasher.update(f"{name} {array.dtype.name} {array.shape}".encode())
            if np.issubdtype(array.dtype, np.floating):
                floats.append(array.reshape(-1).astype(np.float64))
            else:
                hasher.update(array.tobytes())
    return hasher.digest(), _probes(floats)


def fixed_items(family: ModelFamily, modality: str) -> Iterator[MediaItem]:
    """What is mapped: pictures with texture, pictures that move, sounds that rise."""
    if modality == "audio":
        rate = family.ctx.sampling_rate
        for seconds in FIXED_SECONDS:
            sound = fixed_sound(int(seconds * rate), rate)
            yield MediaItem(MediaInfo.audio(len(sound), rate), sound)
        return
    for height, width in FIXED_PICTURES:
        picture = fixed_picture(height, width)
        if modality == "image":
            yield MediaItem(MediaInfo.image(height, width), picture)
        else:
            frames = [picture, picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)]
            yield MediaItem(MediaInfo.video(height, width, len(frames), 2.0), frames)


def _probes(floats: list[np.ndarray]) -> tuple[float, ...]:
    if not floats:
        return ()
    values = np.concatenate(floats)
    places = np.linspace(0, len(values) - 1, NUM_PROBES).astype(np.int64)
    return tuple(float(value) for value in values[places])


def fixed_picture(height: int, width: int) -> Image.Image:
    """A picture with gradients and fine texture, the same on every machine."""
    y, x = np.mgrid[0:height, 0:width]
    channels = (x * 7 + y * 3, x * y + x, (x ^ y) * 5)
    return Image.fromarray(np.stack([channel % 256 for channel in channels], axis=-1).astype(np.uint8), "RGB")


def fixed_sound(num_samples: int, sample_rate: int) -> np.ndarray:
    """A tone that rises from 100 Hz to a quarter of the rate: float32 [num_samples]."""
    time = np.arange(num_samples) / sample_rate
    rise = (sample_rate / 4 - 100) / max(num_samples / sample_rate, 1e-9)
    return (0.5 * np.sin(2 * np.pi * (100 * time + rise * time**2 / 2))).astype(np.float32)
