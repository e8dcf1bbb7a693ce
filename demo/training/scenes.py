"""Scenes: digits and icons scattered over a coloured background, in pictures of every size and shape.

A scene is drawn as a picture that somebody might send, 80 to 600 pixels a side, and knows what is in it and where.
Objects never overlap and their centres differ across the picture, so that "from left to right" has one meaning.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from demo.training.material import DIGIT_SIDE, ICON_SIDE, Material

MIN_SIDE, MAX_SIDE, MAX_RATIO = 80, 600, 3.0
MAX_OBJECTS = 6
MIN_GAP_ACROSS = 0.08
MIN_INK_CONTRAST = 90.0
MIN_ICON_CONTRAST = 45.0
LUMINANCE = np.array([0.299, 0.587, 0.114])
BACKGROUNDS = {
    "white": (243, 243, 243), "grey": (132, 132, 132), "black": (14, 14, 14), "red": (205, 35, 38),
    "orange": (244, 138, 22), "yellow": (243, 222, 60), "green": (44, 150, 62), "blue": (42, 86, 208),
    "purple": (122, 48, 165), "pink": (248, 160, 196), "brown": (112, 70, 36),
}  # fmt: skip
COLOUR_NAMES = list(BACKGROUNDS)

Pixels = NDArray[np.uint8]
Size = tuple[int, int]


@dataclass(frozen=True)
class Thing:
    """One object: its class (0-9 digits, then icons), its centre, and half its side, in pixels of the picture."""

    kind: int
    x: float
    y: float
    radius: float

    @property
    def is_digit(self) -> bool:
        """Whether this is a digit rather than an icon."""
        return self.kind < 10


@dataclass(frozen=True)
class Scene:
    """A picture, its background's name, and its objects from left to right."""

    picture: Image.Image
    colour: str
    things: list[Thing]


class Painter:
    """Draws scenes from material; everything random comes from the generator that it is given."""

    def __init__(self, material: Material) -> None:
        self.material = material
        self.by_label = [np.flatnonzero(material.labels == label) for label in range(10)]
        self.icons = [Image.fromarray(icon) for icon in material.icons]
        noise = np.random.default_rng(0).normal(0, 1, (MAX_SIDE + 64, MAX_SIDE + 64, 1))
        self.noise = noise.astype(np.float32)

    def draw(self, kinds: list[int], rng: np.random.Generator, digit: int | None = None) -> Scene:
        """Draw one object of each kind, in random order from left to right; crowded pictures may hold fewer.

        `digit` names the one handwritten digit to draw wherever a digit is asked for; by default any of its label.
        """
        size = random_size(rng)
        spots = place(len(kinds), size, rng)
        colour = COLOUR_NAMES[rng.integers(len(COLOUR_NAMES))]
        paper = np.clip(np.array(BACKGROUNDS[colour]) + rng.uniform(-12, 12) + rng.uniform(-6, 6, 3), 0, 255)
        picture = _background(paper, size, rng)
        order = rng.permutation(len(kinds))[: len(spots)]
        things = [Thing(kinds[i], *spot) for i, spot in zip(order, spots, strict=True)]
        for thing in things:
            self._paint(picture, thing, paper, rng, digit)
        return Scene(self._finish(picture, rng), colour, things)

    def _paint(
        self,
        picture: Image.Image,
        thing: Thing,
        paper: NDArray[np.float64],
        rng: np.random.Generator,
        digit: int | None,
    ) -> None:
        side = round(2 * thing.radius)
        corner = (round(thing.x - side / 2), round(thing.y - side / 2))
        if thing.is_digit:
            chosen = self._choose(thing.kind, rng) if digit is None else digit
            mask = _bend_digit(self.material.digits[chosen], side, rng)
            picture.paste(_ink(paper, rng), (*corner, corner[0] + side, corner[1] + side), mask)
        else:
            icon = _restyle(self.icons[thing.kind - 10], paper, rng)
            sprite = _turn_icon(icon, side, rng)
            picture.paste(sprite, corner, sprite)

    def _choose(self, label: int, rng: np.random.Generator) -> int:
        choices = self.by_label[label]
        return int(choices[rng.integers(len(choices))])

    def _finish(self, picture: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Now and then add grain, or what JPEG does to a picture."""
        chance = rng.random()
        if chance < 0.2:
            x, y = rng.integers(0, 64, 2)
            grain = self.noise[y : y + picture.height, x : x + picture.width] * rng.uniform(1, 8)
            return Image.fromarray(np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8))
        if chance < 0.35:
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=int(rng.integers(60, 96)))
            return Image.open(buffer).convert("RGB")
        return picture


def random_size(rng: np.random.Generator) -> Size:
    """Draw (width, height): 80 to 600 pixels each, landscape, portrait or square, at most three to one."""
    width, height = np.exp(rng.uniform(np.log(MIN_SIDE), np.log(MAX_SIDE), 2))
    if rng.random() < 0.1:
        height = width
    longest = MAX_RATIO * min(width, height)
    return round(min(width, longest)), round(min(height, longest))


def place(count: int, size: Size, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Return (x, y, radius) of up to `count` objects from left to right, none of them overlapping."""
    width, height = size
    scale = float(rng.uniform(0.45, 0.85))
    while count:
        side = min(scale * (width * height / count) ** 0.5, 0.9 * min(size))
        for _ in range(12):
            spots = _try_to_place(count, size, side * np.exp(rng.uniform(-0.2, 0.1, count)), rng)
            if spots:
                return spots
        scale *= 0.9
        if scale < 0.45:
            count, scale = count - 1, 0.7
    return []


def _try_to_place(
    count: int, size: Size, sides: NDArray[np.float64], rng: np.random.Generator
) -> list[tuple[float, float, float]]:
    width, height = size
    gap = MIN_GAP_ACROSS * width
    room = width - sides.max() - gap * (count - 1)
    if room < 0:
        return []
    x = np.sort(rng.uniform(0, room, count)) + gap * np.arange(count) + sides.max() / 2
    y = rng.uniform(sides / 2, height - sides / 2)
    reach = 0.47 * (sides[:, None] + sides[None, :])
    apart = (np.abs(x[:, None] - x) >= reach) | (np.abs(y[:, None] - y) >= reach)
    if not (apart | np.eye(count, dtype=bool)).all():
        return []
    return list(zip(x.tolist(), y.tolist(), (sides / 2).tolist(), strict=True))


def _background(paper: NDArray[np.float64], size: Size, rng: np.random.Generator) -> Image.Image:
    """Fill a picture with a colour that, half of the time, drifts a little from corner to corner."""
    drift = rng.uniform(0, 10) if rng.random() < 0.5 else 0.0
    if not drift:
        return Image.new("RGB", size, tuple(int(value) for value in paper))
    corners = paper + rng.normal(0, drift, (2, 2, 1)) + rng.normal(0, drift / 3, (2, 2, 3))
    corners = np.clip(corners, 0, 255).astype(np.uint8)
    return Image.fromarray(corners).resize(size, Image.Resampling.BILINEAR)


def _ink(paper: NDArray[np.float64], rng: np.random.Generator) -> tuple[int, ...]:
    """Draw a colour that differs enough from the paper in luminance."""
    while True:
        ink = np.full(3, rng.choice([0.0, 255.0])) if rng.random() < 0.4 else rng.uniform(0, 255, 3)
        if abs((ink - paper) @ LUMINANCE) >= MIN_INK_CONTRAST:
            return tuple(int(value) for value in ink)


def _bend_digit(digit: Pixels, side: int, rng: np.random.Generator) -> Image.Image:
    """Rotate, shear, stretch and dent a digit into a mask of `side` pixels: each of nine cells bends on its own."""
    angle, shear = np.deg2rad(rng.uniform(-15, 15)), rng.uniform(-0.2, 0.2)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) @ [[1.0, shear], [0.0, 1.0]]
    turn *= np.exp(rng.uniform(-0.15, 0.15, 2))[:, None]
    steps = np.linspace(-0.5, 0.5, 4)
    knots = np.stack(np.meshgrid(steps, steps), -1) @ turn.T * DIGIT_SIDE * rng.uniform(0.84, 1.02)
    knots += DIGIT_SIDE / 2 + rng.normal(0, 0.6, (4, 4, 2))
    edges = np.rint((steps + 0.5) * side).astype(int)
    mesh = [
        (
            (int(edges[j]), int(edges[i]), int(edges[j + 1]), int(edges[i + 1])),
            (*knots[i, j], *knots[i + 1, j], *knots[i + 1, j + 1], *knots[i, j + 1]),
        )
        for i in range(3)
        for j in range(3)
    ]
    return Image.fromarray(digit).transform((side, side), Image.Transform.MESH, mesh, Image.Resampling.BICUBIC)


def _restyle(icon: Image.Image, paper: NDArray[np.float64], rng: np.random.Generator) -> Image.Image:
    """Vary an icon's colours and flatten its shades, as long as it stays visible on the paper."""
    pixels = np.asarray(icon)
    for _ in range(4):
        spread = rng.choice([0.0, 0.12, 0.3], p=[0.3, 0.5, 0.2])
        colours = pixels[..., :3] * np.exp(rng.normal(0, spread, 3)) + rng.normal(0, 60 * spread, 3)
        colours = np.clip(colours, 0, 255)
        opaque = pixels[::4, ::4, 3] > 127
        if np.abs(colours[::4, ::4][opaque] - paper).max(1).mean() >= MIN_ICON_CONTRAST:
            break
    flat = Image.fromarray(colours.astype(np.uint8))
    if rng.random() < 0.2:
        flat = ImageOps.posterize(flat, int(rng.integers(2, 4)))
    if rng.random() < 0.4:
        flat, icon = ImageOps.mirror(flat), ImageOps.mirror(icon)
    flat.putalpha(icon.getchannel("A"))
    return flat


def _turn_icon(icon: Image.Image, side: int, rng: np.random.Generator) -> Image.Image:
    """Rotate and stretch an icon into `side` pixels."""
    if side < 0.75 * ICON_SIDE:
        icon = icon.reduce(2)
    angle = np.deg2rad(rng.uniform(-18, 18))
    stretch = np.exp(rng.uniform(-0.08, 0.08, 2)) * rng.uniform(1.0, 1.15) * icon.width / side
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) * stretch[:, None]
    offset = icon.width / 2 - turn @ np.full(2, side / 2)
    coefficients = (*turn[0], offset[0], *turn[1], offset[1])
    return icon.transform((side, side), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)
