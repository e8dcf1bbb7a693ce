"""Train the demo model: a small LLaVA-NeXT that looks at scenes of digits and icons and answers questions about them.

    python -m demo.training.train --material material.npz --output demo/model --steps 7000
    python -m demo.training.train --material material.npz --output demo/model --seconds 540
    python -m demo.training.train … --start-from demo/model --learning-rate 5e-4     # go on, with a fresh optimiser
    python -m demo.training.train … --heads heads.pt        # and later go on with what teaches the tower, too

`material.npz` is what `python -m demo.training.material` packs. One loop, two losses: the tokens of every answer in a
chat, and what lies in every patch of every tile, which only teaches the tower and is thrown away. The rate warms up,
holds, and falls to zero from two fifths on. Batches depend on the seed and their number alone; a GPU sums in no fixed
order, so the same seed gives a model as good, not the same bits.
`python -m demo.measuring.evaluate` measures it, `python -m demo.measuring.card` writes the model card.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, LlavaNextForConditionalGeneration, PreTrainedTokenizerFast

from demo.training.architecture import build_model, save_processor, save_weights
from demo.training.batches import BATCHES_PER_POOL, Batch, Collator, Lessons
from demo.training.chat import build_tokenizer
from demo.training.material import load_material
from demo.training.student import Outcome, Student

WARMUP_STEPS = 200
FALL_FROM = 0.4
TOWER_LOSS_WEIGHT = 0.5
REPORT_EVERY = 100


@dataclass
class Progress:
    """How far training is, by steps or by the clock, whichever is further."""

    num_steps: int
    num_seconds: float
    begun: float = field(default_factory=time.monotonic)
    step: int = 0

    @property
    def seconds(self) -> float:
        """Seconds since the first batch was asked for."""
        return time.monotonic() - self.begun

    @property
    def share(self) -> float:
        """How much is done, 0 to 1."""
        return min(1.0, max(self.step / self.num_steps, self.seconds / self.num_seconds))


def learning_rate(progress: Progress, peak: float) -> float:
    """Warm up, hold, then fall to zero in a straight line."""
    warm = min(1.0, (progress.step + 1) / WARMUP_STEPS)
    return peak * warm * min(1.0, (1 - progress.share) / (1 - FALL_FROM))


def build_optimizer(student: Student, rate: float) -> torch.optim.AdamW:
    """Weight decay for matrices alone."""
    parameters = list(student.parameters())
    matrices = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05}
    vectors = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, vectors], lr=rate, betas=(0.9, 0.98), fused=parameters[0].is_cuda)


def train(student: Student, batches: Iterator[Batch], progress: Progress, args: argparse.Namespace) -> None:
    """Take steps until the progress is complete."""
    device = torch.device(args.device)
    optimizer = build_optimizer(student, args.learning_rate)
    report = Report(progress)
    for batch in batches:
        if progress.share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, args.learning_rate)
        with precision(device):
            outcome = student(batch.to(device))
        optimizer.zero_grad()
        (outcome.answer_loss + TOWER_LOSS_WEIGHT * outcome.tower_loss).backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        progress.step += 1
        report.add(outcome)
        if args.save_every and progress.step % args.save_every == 0:
            save_weights(student.model, args.output)


def precision(device: torch.device) -> AbstractContextManager[object]:
    """Train in bfloat16 on a GPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


class Report:
    """Prints the means of the last steps; reads the device only then."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.recent: list[torch.Tensor] = []

    def add(self, outcome: Outcome) -> None:
        """Note a step."""
        losses = torch.stack([outcome.answer_loss, outcome.tower_loss, outcome.right.float().mean()])
        self.recent.append(losses.detach())
        step = self.progress.step
        if step % REPORT_EVERY == 0 or step in {1, 10, 30}:
            answer, tower, right = torch.stack(self.recent).mean(0).tolist()
            self.recent.clear()
            print(
                f"step {step:5d}  answer loss {answer:6.3f}  tower loss {tower:6.3f}  all answers right {right:6.1%}"
                f"  {self.progress.seconds:4.0f} s, {self.progress.share:4.0%} done",
                flush=True,
            )


def lessons(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> Iterator[Batch]:
    """Draw batches in worker processes."""
    num_pools = math.ceil(args.steps / BATCHES_PER_POOL)
    dataset = Lessons(load_material(args.material), Collator(tokenizer), args.seed, num_pools, args.batch_size)
    options = {"prefetch_factor": args.prefetch} if args.workers else {}
    pin = args.device.startswith("cuda")
    loader = DataLoader(dataset, batch_size=None, num_workers=args.workers, pin_memory=pin, **options)
    for pool in loader:
        yield from pool


def load_or_build(start_from: Path | None) -> tuple[LlavaNextForConditionalGeneration, PreTrainedTokenizerFast]:
    """Start afresh, or from a checkpoint."""
    if start_from:
        model = LlavaNextForConditionalGeneration.from_pretrained(start_from, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(start_from)
    tokenizer = build_tokenizer()
    return build_model(tokenizer), tokenizer


def main() -> None:
    """Train and save."""
    args = _parser().parse_args()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    model, tokenizer = load_or_build(args.start_from)
    student = Student(model).to(args.device)
    save_processor(tokenizer, args.output)
    if args.compile:
        student.compile_layers()
    print(f"{student.model.num_parameters():,} parameters on {device_name(args.device)}", flush=True)
    if args.heads and args.heads.exists():
        student.load_state_dict(torch.load(args.heads, args.device), strict=False)
    progress = Progress(args.steps, args.seconds or math.inf)
    train(student, lessons(tokenizer, args), progress, args)
    save_weights(student.model, args.output)
    if args.heads:
        torch.save({n: value for n, value in student.state_dict().items() if not n.startswith("model.")}, args.heads)
    (args.output / "training.json").write_text(json.dumps(history(progress, args), indent=2) + "\n")
    print(f"saved after {progress.step} steps and {progress.seconds:.0f} s", flush=True)


def history(progress: Progress, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every run that made these weights, the last one last."""
    before = args.start_from / "training.json" if args.start_from else None
    run = {
        "steps": progress.step, "seconds": round(progress.seconds), "device": device_name(args.device),
        "batch_size": args.batch_size, "learning_rate": args.learning_rate, "seed": args.seed,
    }  # fmt: skip
    return [*(json.loads(before.read_text()) if before and before.exists() else []), run]


def device_name(device: str) -> str:
    """Name the hardware."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else f"CPU ({os.cpu_count()} cores)"


def _parser() -> argparse.ArgumentParser:
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "(default: %(default)s)"
    parser.add_argument("--material", type=Path, required=True, metavar="FILE", help="packed digits and icons")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the checkpoint goes")
    parser.add_argument("--start-from", type=Path, metavar="DIR", help="a checkpoint to go on from")
    parser.add_argument(
        "--heads",
        type=Path,
        metavar="FILE",
        help="where what only teaches the tower is kept, and read if it is there",
    )
    parser.add_argument("--steps", type=int, default=20000, help=f"optimiser steps at most {default}")
    parser.add_argument("--seconds", type=float, help="end after so many seconds, the rate falling in time")
    parser.add_argument(
        "--batch-size", type=int, default=128, help=f"requests a step, a quarter of it with several pictures {default}"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-3, help=f"the peak {default}")
    parser.add_argument("--seed", type=int, default=0, help=f"of weights, pictures and questions {default}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help=default)
    parser.add_argument("--compile", action="store_true", help="compile the layers: worth its half minute on a GPU")
    parser.add_argument(
        "--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help=f"processes that draw scenes {default}"
    )
    parser.add_argument("--prefetch", type=int, default=2, help=f"groups of batches each worker holds ready {default}")
    parser.add_argument("--save-every", type=int, default=0, metavar="N", help="also save the weights every N steps")
    return parser


if __name__ == "__main__":
    main()
