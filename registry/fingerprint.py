"""What a family does on a checkpoint, as a digest: services that would disagree refuse each other.

The digest covers behaviour (token ids, shapes, pixels), never source text or library versions. Float
mapper outputs differ in their last bits between library versions, so they travel as probe values that
are compared with a tolerance.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from PIL import Image

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
PROBE_TEXTS: Final = ("Diptych: what is in the picture?", " déjà vu, 図 1 — 42 %\n", "USER: a b  c ASSISTANT:")


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
    """The fingerprint of a family on its checkpoint."""
    pixels, probes = _mapper_part(family)
    parts = {
        "architecture": _digest(family.ctx.architecture),
        "contract version": _digest(CONTRACT_VERSION),
        "wire dtypes": _digest(dict(WIRE_DTYPES)),
        "tokenizer": _tokenizer_part(family),
        "item layout": _layout_part(family),
        "input mapper": pixels,
    }
    whole = hashlib.sha256(b"".join(parts[name] for name in sorted(parts))).digest()
    return Fingerprint(whole, parts, probes)


def _digest(value: object) -> bytes:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()


def _tokenizer_part(family: ModelFamily) -> bytes:
    tokenizer = family.ctx.tokenizer
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    encoded = [tokenizer.encode(text) for text in PROBE_TEXTS]
    placeholders = sorted(family.modality_of_placeholder.items())
    return _digest([vocabulary, encoded, placeholders])


def _layout_part(family: ModelFamily) -> bytes:
    if not family.has_layout("image"):
        return _digest(sorted(family.modalities))
    sizes = [(height, width) for height in FIXED_SIDES for width in FIXED_SIDES]
    return _digest([_describe(family.layout(MediaInfo.image(*size))) for size in sizes])


def _describe(layout: ItemLayout) -> object:
    return [
        [[run.token_id, run.count, run.is_feature] for run in layout.replacement],
        [[name, spec.dtype, list(spec.shape)] for name, spec in sorted(layout.tensors.items())],
        [[name, array.dtype.name, array.tolist()] for name, array in sorted(layout.constants.items())],
    ]


def _mapper_part(family: ModelFamily) -> tuple[bytes, tuple[float, ...]]:
    """Digest over the integer tensors of the fixed pictures, and probes from the float ones."""
    if "image" not in family.modalities:
        return _digest(None), ()
    hasher, floats = hashlib.sha256(), []
    for height, width in FIXED_PICTURES:
        item = MediaItem(MediaInfo.image(height, width), fixed_picture(height, width))
        for name, array in sorted(family.map_item(item).items()):
            hasher.update(f"{name} {array.dtype.name} {array.shape}".encode())
            if np.issubdtype(array.dtype, np.floating):
                floats.append(array.reshape(-1).astype(np.float64))
            else:
                hasher.update(array.tobytes())
    return hasher.digest(), _probes(floats)


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
