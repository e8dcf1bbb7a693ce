"""How far the logits of a whole generation are from float32, ours and transformers' own, at real geometries.

The engine answers greedily, several requests at once, and says the likeliest tokens' log probabilities at every step.
transformers then computes the same tokens' for the same pixels and answers, with the same weights: in bfloat16 with its
own attention, and in float32. Then the same requests one by one: how many greedy tokens depend on the batch.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.load import SIDES, max_model_len
from benchmarks.gpu.models import ensure_checkpoint
from benchmarks.gpu.options import parse_for_gpu
from benchmarks.gpu.session import Sheet, exit_when_told, run_module, sheets
from benchmarks.gpu.workload import Driver
from benchmarks.results import make_parser, write_result
from executor_service.engine.request import Request

NUM_LIKELIEST: Final = 20
TARGET: Final = 1.2
"""Times transformers' own error."""
LIMIT: Final = 200.0


def main(argv: list[str] | None = None) -> int:
    """One process per geometry; or, with `--sheet`, be it."""
    parser = make_parser("gpu.accuracy", __doc__)
    parser.add_argument("--geometries", type=lambda text: tuple(text.split(",")), default=("llava-1.5-7b",))
    parser.add_argument("--requests", type=int, default=8, help="at once (default 8)")
    parser.add_argument("--tokens", type=int, default=64, help="out, of each (default 64)")
    parser.add_argument("--device", default="cuda", help="cpu to try it out with a tiny geometry")
    parser.add_argument("--decoders", type=lambda text: tuple(text.split(",")), default=("fused", "stock"))
    parser.add_argument("--sheet", type=Path, help=argparse.SUPPRESS)
    options = parse_for_gpu(parser, argv)
    exit_when_told()
    if options.sheet:
        return measure(Sheet(options.sheet), options)
    load_before = os.getloadavg()[0]
    figures = {}
    with sheets(options.output) as folder:
        for geometry in options.geometries:
            flags = [
                "--geometries", geometry, "--requests", str(options.requests), "--tokens", str(options.tokens),
                "--device", options.device, "--decoders", ",".join(options.decoders),
            ]  # fmt: skip
            sheet = folder / f"{geometry}.json"
            figures[geometry] = run_module("benchmarks.gpu.accuracy", *flags, sheet=sheet, limit=LIMIT)
            write_result("gpu_accuracy", figures, options, load_before)
    return 0


def measure(sheet: Sheet, options: argparse.Namespace) -> int:
    """Ours by every decoder first, each engine gone before the next; then both of transformers'."""
    (geometry,) = options.geometries
    model = ensure_checkpoint(geometry)
    answers: dict[str, Answers] = {}
    for decoder in options.decoders:
        sheet.measure(f"{decoder}, batches", lambda d=decoder: answer(answers, model, geometry, d, options))
        _free()
    sheet.measure("errors", lambda: compare(model, answers, options))
    return 0


class Answers:
    """What one decoder has said: requests with their answers, and of each the likeliest [n, k] ids and values."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.likeliest: list[tuple[Tensor, Tensor]] = []


def answer(
    answers: dict[str, Answers], model: Path, geometry: str, decoder: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Generate all together, then one by one; how far equal answers go, and what decided where they part."""
    driver = Driver(
        model, device=options.device, decoder=decoder, max_model_len=max_model_len(geometry), max_num_seqs=16,
        max_num_batched_tokens=4096, gpu_memory_utilization=0.45,
    )  # fmt: skip

    def make() -> list[Request]:
        side = SIDES[geometry]
        return driver.requests(options.requests, side, options.tokens, seed=42, logprobs=NUM_LIKELIEST)

    together = answers.setdefault(decoder, Answers())
    together.requests = make()
    together.likeliest = generate(driver, together.requests)
    num_equal, margins = [], []
    for request, alone in zip(together.requests, make(), strict=True):
        generate(driver, [alone])
        parted = np.flatnonzero(alone.output_token_ids != request.output_token_ids)
        num_equal.append(int(parted[0]) if len(parted) else options.tokens)
        if len(parted):
            values = together.likeliest[len(num_equal) - 1][1][parted[0]]
            margins.append(float(values[0] - values[1]))
    print(f"{decoder}: of {options.tokens} tokens alone and in a batch equal: {num_equal}", flush=True)
    return {"tokens": options.tokens, "equal_alone_and_together": num_equal, "margins_where_they_part": margins}


def generate(driver: Driver, requests: list[Request]) -> list[tuple[Tensor, Tensor]]:
    """Per request the likeliest tokens of every step, ids and log probabilities [n, NUM_LIKELIEST]."""
    entries: dict[int, list[Any]] = {request.request_id: [] for request in requests}
    for request in requests:
        driver.engine.add(request)
    while driver.engine.has_work:
        report = driver.engine.step()
        for index, entry in report.tokens.logprobs:
            entries[report.tokens.request_ids[index]].append(entry.top)
    return [
        (
            torch.tensor([[token for token, _ in top] for top in entries[request.request_id]]),
            torch.tensor([[value for _, value in top] for top in entries[request.request_id]], dtype=torch.float64),
        )
        for request in requests
    ]


def compare(model: Path, answers: dict[str, Answers], options: argparse.Namespace) -> dict[str, Any]:
    """Root mean squares of the errors, and their ratio."""
    from transformers import AutoModelForImageTextToText

    reference: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.bfloat16).eval().to(options.device)
    narrow = {decoder: teacher_forced(reference, one) for decoder, one in answers.items()}
    reference.float()  # the same weights
    wide = {decoder: teacher_forced(reference, one) for decoder, one in answers.items()}
    figures = {}
    for decoder, said in answers.items():
        pairs = zip(said.likeliest, narrow[decoder], wide[decoder], strict=True)
        ours, theirs = zip(*((values - w, n - w) for (_, values), n, w in pairs), strict=True)
        error, own = (torch.cat(list(parts)).pow(2).mean().sqrt().item() for parts in (ours, theirs))
        figures[decoder] = {"error": error, "transformers": own, "ratio": error / own, "met": error <= TARGET * own}
        print(f"{decoder}: error {error:.2e}, transformers' own {own:.2e}, ratio {error / own:.3f}", flush=True)
    return figures


@torch.inference_mode()
def teacher_forced(reference: Any, said: Answers) -> list[Tensor]:
    """Log probabilities that a transformers model gives the same tokens, float64 [n, NUM_LIKELIEST] per request."""
    found = []
    for request, (ids, _) in zip(said.requests, said.likeliest, strict=True):
        tokens = torch.from_numpy(request.token_ids[: request.num_tokens].copy())[None].to(reference.device)
        logits = reference(input_ids=tokens, **pixels(request, reference.dtype, reference.device)).logits[0]
        rows = logits[request.num_prompt_tokens - 1 : -1].double().log_softmax(-1)
        found.append(rows.gather(-1, ids.to(reference.device)).cpu())
    return found


def pixels(request: Request, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The request's tiles as transformers takes them."""
    (item,) = request.items
    normalization = item.layout.tensors["pixel_values"].normalization
    assert normalization is not None
    values = torch.from_numpy(normalization.apply(item.tensors["pixel_values"].cpu().numpy())).to(device, dtype)[None]
    constants = {name: torch.from_numpy(value)[None].to(device) for name, value in item.layout.constants.items()}
    return {"pixel_values": values, **constants}


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
