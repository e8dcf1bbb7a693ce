"""Examine a checkpoint: accuracy per question type on held-out digits and scenes, and on another style of drawing.

    python -m demo.scenes.evaluate --model demo/model --material material.npz --output demo/model/accuracy.json

An answer counts if its whole text is right, both answers in a chat of two turns. Every answer is scored in one forward
pass: greedy decoding gives the right text exactly if each of its tokens is the most likely one after those before it.
The weights are the checkpoint's bfloat16, the arithmetic is float32.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from torch.utils.data import ConcatDataset, DataLoader
from transformers import AutoTokenizer, LlavaNextForConditionalGeneration

from demo.scenes.batches import EVERY_DIGIT, Collator, Exam
from demo.scenes.material import NUM_HELD_OUT, load_material
from demo.scenes.questions import TYPES
from demo.scenes.student import Student

EXAM_SEED = 20240607
COLUMNS = {
    "held-out digits and scenes": ("held_out", "noto"),
    "held-out scenes of training digits": ("train", "noto"),
    "style shift: held-out digits, Twitter drawings": ("held_out", "twitter"),
}


@torch.inference_mode()
def examine(
    student: Student, collate: Collator, material: Path, num_questions: int, workers: int
) -> dict[str, dict[str, list[int]]]:
    """Return {column: {question type: [right, asked]}}."""
    device = student.mean.device
    figures: dict[str, dict[str, list[int]]] = {}
    for column, (split, style) in COLUMNS.items():
        types = dict.fromkeys(TYPES, num_questions)
        if column == next(iter(COLUMNS)):
            types[EVERY_DIGIT] = NUM_HELD_OUT
        drawn_from = load_material(material, split, style)
        exams = [Exam(drawn_from, name, count, EXAM_SEED, collate) for name, count in types.items()]
        names = [name for name, exam in zip(types, exams, strict=True) for _ in range(len(exam))]
        figures[column] = {name: [0, 0] for name in types}
        loader = DataLoader(ConcatDataset(exams), batch_size=None, num_workers=workers)
        for name, batch in zip(names, loader, strict=True):
            right = student(batch.to(device)).right
            figures[column][name][0] += int(right.sum())
            figures[column][name][1] += len(right)
    return figures


def table(figures: dict[str, dict[str, list[int]]]) -> str:
    """Lay the figures out for reading."""
    rows = [f"{'':34}" + "".join(f"{column.split(':')[0]:>38}" for column in figures)]
    for name in figures[next(iter(figures))]:
        cells = [share(*column[name]) if name in column else "" for column in figures.values()]
        rows.append(f"{name:34}" + "".join(f"{cell:>38}" for cell in cells))
    return "\n".join(rows)


def share(right: int, asked: int) -> str:
    """Word a figure: `483 of 500 (96.6 %)`."""
    return f"{right} of {asked} ({100 * right / asked:.1f} %)"


def main() -> None:
    """Examine and print."""
    args = _parser().parse_args()
    model = LlavaNextForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).eval()
    student = Student(model).to(args.device).eval()
    collate = Collator(AutoTokenizer.from_pretrained(args.model))
    figures = examine(student, collate, args.material, args.questions, args.workers)
    print(table(figures))
    if args.output:
        args.output.write_text(json.dumps(figures, indent=2) + "\n")


def _parser() -> argparse.ArgumentParser:
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the checkpoint")
    parser.add_argument("--material", type=Path, required=True, metavar="FILE", help="packed digits and icons")
    parser.add_argument("--questions", type=int, default=500, help="of each type (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the figures go as JSON")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="(default: %(default)s)")
    return parser


if __name__ == "__main__":
    main()
