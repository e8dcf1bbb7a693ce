"""Write held-out digits as picture files of the kinds that people send: PNG, JPEG, WebP, grey, transparent, rotated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from demo.digits_data import Digits, compose, random_size

NUM_PER_LABEL = 10
MAX_PICTURE_SIDE = 320
PICTURE_SEED = 28
EXIF_ORIENTATION = 0x0112
# How an upright picture must be stored so that a viewer that honours the orientation shows it upright again.
STORED_FOR = {
    3: Image.Transpose.ROTATE_180,
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
}


def write_pictures(held_out: Digits, folder: Path) -> list[dict[str, object]]:
    """Write ten pictures of each digit and `index.json`; return the index's entries."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(PICTURE_SEED)
    chosen = np.concatenate([np.flatnonzero(held_out.labels == label)[:NUM_PER_LABEL] for label in range(10)])
    entries: list[dict[str, object]] = []
    for number, index in enumerate(rng.permutation(chosen)):
        picture = compose(held_out.pixels[index], random_size(rng, MAX_PICTURE_SIDE), rng).picture
        suffix, save = _kind(number)
        file = f"picture-{number:03d}{suffix}"
        save(picture, folder / file, rng)
        entries.append({"file": file, "digit": int(held_out.labels[index])})
    return entries


def read_index(folder: Path) -> list[tuple[Path, int]]:
    """Return (path, digit) of every picture that `index.json` lists."""
    index = json.loads((folder / "index.json").read_text())
    return [(folder / entry["file"], entry["digit"]) for entry in index["pictures"]]


Save = Callable[[Image.Image, Path, np.random.Generator], None]


def _kind(number: int) -> tuple[str, Save]:
    """Of every ten pictures: four JPEG, two PNG, and one each of WebP, grey, transparent and rotated."""
    kinds: list[tuple[str, Save]] = [
        (".jpg", _save_jpeg),
        (".png", _save_png),
        (".jpg", _save_jpeg),
        ("-grey.png", _save_grey),
        (".jpg", _save_jpeg),
        ("-rgba.png", _save_rgba),
        (".webp", _save_webp),
        ("-rotated.jpg", _save_rotated),
        (".png", _save_png),
        (".jpg", _save_jpeg),
    ]
    return kinds[number % len(kinds)]


def _save_png(picture: Image.Image, path: Path, rng: np.random.Generator) -> None:
    picture.save(path, optimize=True)


def _save_grey(picture: Image.Image, path: Path, rng: np.random.Generator) -> None:
    picture.convert("L").save(path, optimize=True)


def _save_jpeg(picture: Image.Image, path: Path, rng: np.random.Generator) -> None:
    picture.save(path, quality=int(rng.integers(80, 96)))


def _save_webp(picture: Image.Image, path: Path, rng: np.random.Generator) -> None:
    picture.save(path, quality=90)


def _save_rgba(picture: Image.Image, path: Path, rng: np.random.Generator) -> None:
    """Fade the border out: the colours stay beneath the transparency, which models do not see."""
    width, height = picture.size
    across = np.minimum(np.arange(width), np.arange(width)[::-1]) / width
    down = np.minimum(np.arange(height), np.arange(height)[::-1]) / height
    alpha = np.clip(np.minimum(across[None, :], down[:, None]) * 20, 0, 1) * 255
    faded = picture.copy()
    faded.putalpha(Image.fromarray(alpha.astype(np.uint8)))
    faded.save(path, optimize=True)


def _save_rotated(picture: Image.Image, path: Path, rng: np.random.Generator) -> None:
    orientation = (3, 6, 8)[rng.integers(3)]
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    picture.transpose(STORED_FOR[orientation]).save(path, quality=90, exif=exif)
