"""Examine a checkpoint: accuracy per question type on held-out digits and scenes, and on another style of drawing.

    python -m demo.measuring.evaluate --model demo/model --material material.npz --output demo/model/accuracy.json

An answer counts if its whole text is right, both answers in a chat of two turns. Every answer is scored in one forward
pass: greedy decoding gives the right text exactly if each of its tokens is the most likely one after those before it.
The weights are the checkpoint's bfloat16, the arithmetic is float32. `--questions 100` asks the first hundred of each
type. Every column is printed and written as soon as it is done.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset, DataLoader
from tqdm import tqdm
from transformers import AutoTokenizer, LlavaNextForConditionalGeneration

from demo.training.batches import EVERY_DIGIT, Batch, Collator, Exam
from demo.training.material import NUM_HELD_OUT, load_material
from demo.training.questions import TYPES
from demo.training.student import Student

EXAM_SEED = 20240607
COLUMNS = {
    "held-out digits and scenes": ("held_out", "noto"),
    "held-out scenes of training digits": ("train", "noto"),
    "style shift: held-out digits, Twitter drawings": ("held_out", "twitter"),
}
Figures = dict[str, list[int]]
"""{question type: [right, asked]}"""


@torch.inference_mode()
def examine(student: Student, exams: dict[str, Exam], workers: int, bar: tqdm[Any]) -> Figures:
    """Put every question of every exam; the bar counts them."""
    names = [name for name, exam in exams.items() for _ in range(len(exam))]
    figures = {name: [0, 0] for name in exams}
    loader: DataLoader[Batch] = DataLoader(ConcatDataset(exams.values()), batch_size=None, num_workers=workers)
    for name, batch in zip(names, loader, strict=True):
        right = student(batch.to(student.mean.device)).right
        figures[name][0] += int(right.sum())
        figures[name][1] += len(right)
        bar.set_postfix_str(name, refresh=False)
        bar.update(len(right))
    return figures


def draw_up(column: str, material: Path, num_questions: int, collate: Collator) -> dict[str, Exam]:
    """Return a column's exam of each type; the first one also asks for every held-out digit, alone."""
    split, style = COLUMNS[column]
    drawn_from = load_material(material, split, style)
    return {
        name: Exam(drawn_from, name, number, EXAM_SEED, collate)
        for name, number in num_to_ask(column, num_questions).items()
    }


def num_to_ask(column: str, num_questions: int) -> dict[str, int]:
    """Return how many questions of each type a column asks."""
    types = dict.fromkeys(TYPES, num_questions)
    return types | {EVERY_DIGIT: NUM_HELD_OUT} if column == next(iter(COLUMNS)) else types


def table(figures: Figures) -> str:
    """Lay a column out for reading."""
    return "\n".join(f"{name:34}{share(*counts):>24}" for name, counts in figures.items())


def share(right: int, asked: int) -> str:
    """Word a figure: `483 of 500 (96.6 %)`."""
    return f"{right} of {asked} ({100 * right / asked:.1f} %)"


def main() -> None:
    """Examine, print and write, column by column."""
    args = _parser().parse_args()
    model = LlavaNextForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).eval()
    student = Student(model).to(args.device).eval()
    collate = Collator(AutoTokenizer.from_pretrained(args.model))
    figures: dict[str, Figures] = {}
    total = sum(sum(num_to_ask(column, args.questions).values()) for column in COLUMNS)
    with tqdm(total=total, unit=" questions", dynamic_ncols=True) as bar:
        for column in COLUMNS:
            exams = draw_up(column, args.material, args.questions, collate)
            figures[column] = examine(student, exams, args.workers, bar)
            tqdm.write(f"{column}\n{table(figures[column])}\n")
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
