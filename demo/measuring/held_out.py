"""Two hundred held-out questions as files: pictures of the kinds that people send, and an index with the truth.

    python -m demo.measuring.held_out --material material.npz --output demo/held_out

Digits are held out, scenes are drawn from a seed of their own, icons are Noto's. Pictures are JPEG, PNG and WebP; some
carry an alpha channel, some are stored turned, with an EXIF orientation that says so. `index.json` lists for each
question its type, its form (`chat`: messages for the chat template; `prompt`: the text itself), its pictures, and its
turns: question and right answer. In a two-turn chat the second question is asked after the first one's right answer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from demo.training.batches import Exam, Request
from demo.training.material import load_material
from demo.training.questions import SEVERAL, SINGLE, TWO_TURNS

HELD_OUT_SEED = 19981101
NUM_PER_TYPE = dict.fromkeys(SINGLE, 16) | dict.fromkeys(SEVERAL, 12) | {TWO_TURNS: 20}
PROMPT_SHARE = 0.3
MAX_PNG_BYTES = 30_000
EXIF_ORIENTATION = 0x0112
# How an upright picture must be stored so that a viewer that honours the orientation shows it upright again.
STORED_FOR = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


def write(material: Path, folder: Path) -> list[dict[str, Any]]:
    """Write pictures and index; return the index's entries."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(HELD_OUT_SEED)
    drawn_from = load_material(material, "held_out", "noto")
    entries: list[dict[str, Any]] = []
    for question_type, count in NUM_PER_TYPE.items():
        exam = Exam(drawn_from, question_type, count, HELD_OUT_SEED)
        for index in range(count):
            entries.append(_entry(exam.request(index), question_type, folder, len(entries), rng))
    (folder / "index.json").write_text(json.dumps({"questions": entries}, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return entries


def _entry(request: Request, question_type: str, folder: Path, number: int, rng: np.random.Generator) -> dict[str, Any]:
    letters = "abcd" if len(request.scenes) > 1 else [""]
    names = [
        _save(scene.picture, folder, f"{number:03d}{letter}", rng)
        for letter, scene in zip(letters, request.scenes, strict=False)
    ]
    entry: dict[str, Any] = {"number": number, "type": question_type, "form": "chat", "pictures": names}
    if len(request.turns) == 1 and rng.random() < PROMPT_SHARE:
        entry |= {"form": "prompt", "prompt": request.texts[0]}
    return entry | {"turns": [{"question": turn.question, "answer": turn.answer} for turn in request.turns]}


def _save(picture: Image.Image, folder: Path, stem: str, rng: np.random.Generator) -> str:
    """Write a picture in one of five ways; return the file's name."""
    way = rng.choice(["jpeg", "png", "webp", "alpha", "turned"], p=[0.4, 0.25, 0.15, 0.1, 0.1])
    if way in {"png", "alpha"}:
        name = f"{stem}.png"
        (picture.convert("RGBA") if way == "alpha" else picture).save(folder / name, optimize=True)
        if (folder / name).stat().st_size <= MAX_PNG_BYTES:
            return name
        (folder / name).unlink()
    if way == "webp":
        picture.save(folder / f"{stem}.webp", quality=90)
        return f"{stem}.webp"
    name = f"{stem}.jpg"
    if way == "turned":
        _save_turned(picture, folder / name, int(rng.choice(list(STORED_FOR))))
    else:
        picture.save(folder / name, quality=int(rng.integers(82, 95)))
    return name


def _save_turned(picture: Image.Image, path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    picture.transpose(STORED_FOR[orientation]).save(path, quality=90, exif=exif)


def main() -> None:
    """Write the folder."""
    args = _parser().parse_args()
    entries = write(args.material, args.output)
    files = [path for path in args.output.iterdir() if path.is_file()]
    print(f"{len(entries)} questions, {len(files)} files, {sum(path.stat().st_size for path in files):,} bytes")


def _parser() -> argparse.ArgumentParser:
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--material", type=Path, required=True, metavar="FILE", help="packed digits and icons")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where pictures and index go")
    return parser


if __name__ == "__main__":
    main()
