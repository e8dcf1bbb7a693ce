"""The sampling kernel by what its rows ask for, against the floor of reading logits and counts once.

Beside some stands the same work in torch's own operations (softmax, sort, cumulative sum, search). Inputs rotate so
that none is found in the L2 cache; rates are measured in the same run.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable
from itertools import cycle, islice
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.gpu.options import parse_for_gpu
from benchmarks.gpu.timing import Ceilings, measure_ceilings, rotating_copies, seconds_each
from benchmarks.results import make_parser, spread, write_result
from executor_service.engine.messages import SamplingParams
from executor_service.engine.request import Request
from executor_service.engine.sampling_slots import SamplingSlots
from executor_service.kernels.cuda.module import num_multiprocessors
from executor_service.kernels.sample import SAMPLE

ROWS: Final = {32_064: (1, 16, 64, 128, 256), 128_256: (1, 64, 256)}
"""By vocabulary."""
QUICK_ROWS: Final = {32_064: (256,)}
MOST_ROWS: Final = 256
PENALTIES: Final[dict[str, Any]] = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2}
EVERYTHING: Final[dict[str, Any]] = {
    **PENALTIES, "min_p": 0.001, "top_p": 0.95, "logprobs": 20, "min_tokens": 1000,
    "logit_bias": tuple((token, 1.0) for token in range(100)),
    "bad_words": tuple((token,) for token in range(200, 300)),
}  # fmt: skip
KINDS: Final[dict[str, dict[str, Any]]] = {
    "greedy": {"temperature": 0.0},
    "greedy, 5 logprobs": {"temperature": 0.0, "logprobs": 5},
    "greedy, penalties": {"temperature": 0.0, **PENALTIES},
    "temperature": {"temperature": 0.8},
    "min-p": {"min_p": 0.05},
    "top-k 50": {"top_k": 50},
    "top-k 1000": {"top_k": 1000},
    "top-p 0.9": {"top_p": 0.9},
    "top-k 50, top-p 0.9": {"top_k": 50, "top_p": 0.9},
    "penalties, top-p 0.9": {"top_p": 0.9, **PENALTIES},
    "everything, top-k 40": {**EVERYTHING, "top_k": 40},
    "everything, top-k 5000": {**EVERYTHING, "top_k": 5000},
}
MIXED: Final = "all of these in turn"


def main(argv: list[str] | None = None) -> int:
    """Print and write microseconds, floors and ratios."""
    parser = make_parser("gpu.sampler", __doc__)
    options = parse_for_gpu(parser, argv)
    load_before = os.getloadavg()[0]
    ceilings = measure_ceilings()
    figures: dict[str, object] = {
        "device": torch.cuda.get_device_name(), "read_bytes_per_second": ceilings.read,
        "write_bytes_per_second": ceilings.write,
    }  # fmt: skip
    for vocabulary, sizes in (QUICK_ROWS if options.quick else ROWS).items():
        for num_rows in sizes:
            for kind in (*KINDS, MIXED):
                figures[f"{kind}, {num_rows} x {vocabulary}"] = measure(kind, num_rows, vocabulary, ceilings)
    write_result("gpu_sampler", figures, options, load_before)
    return 0


def measure(kind: str, num_rows: int, vocabulary: int, ceilings: Ceilings) -> dict[str, object]:
    """One kind of row in all rows, or all kinds in turn."""
    kinds = list(KINDS.values()) if kind == MIXED else [KINDS[kind]]
    requests = [request(number, values) for number, values in enumerate(islice(cycle(kinds), num_rows))]
    slots = SamplingSlots(torch.device("cuda"), num_rows, vocabulary, frozenset({2}))
    taken = slots.prepare(requests)
    places = torch.tensor(taken).cuda()
    numbers = torch.tensor([one.num_tokens for one in requests]).cuda()
    num_penalized = sum(one.sampling.has_penalties for one in requests)
    num_bytes = 2 * num_rows * vocabulary + num_penalized * (2 * vocabulary + vocabulary // 8)
    inputs = rotating_copies(lambda: (3 * torch.randn((num_rows, vocabulary), device="cuda", dtype=torch.bfloat16),),
                             2 * num_rows * vocabulary)  # fmt: skip
    order = slots.order(taken, num_multiprocessors(0))
    begun = None if order is None else torch.from_numpy(order).cuda()
    op = SAMPLE.direct("cuda")
    ours = seconds_each([lambda a=arguments: op(*a, places, numbers, begun, *slots.tables) for arguments in inputs])
    floor, median = ceilings.floor(num_bytes, 0), statistics.median(ours)
    figures: dict[str, object] = {
        "microseconds": spread([1e6 * value for value in ours]), "floor_microseconds": 1e6 * floor,
        "floor_over_measured": floor / median,
    }  # fmt: skip
    line = f"{kind:<24} {num_rows:4d} x {vocabulary:6d}  {1e6 * median:8.2f} µs  {floor / median:6.1%} of the floor"
    if (same := TORCH.get(kind)) is not None and num_rows == MOST_ROWS:
        torchs = seconds_each([lambda a=arguments: same(*a) for arguments in inputs])
        figures["torch_microseconds"] = spread([1e6 * value for value in torchs])
        line += f", torch {1e6 * statistics.median(torchs):8.2f} µs"
    print(line, flush=True)
    return figures


def request(number: int, values: dict[str, Any]) -> Request:
    """A prompt of 640 tokens, 64 in the output."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, 32_000, (704,), generator=generator).tolist()
    sampling = SamplingParams(max_tokens=2000, seed=number, **values)
    return Request(number, tokens[:640], [], sampling, 4096, output_token_ids=tokens[640:])


def torch_greedy(logits: Tensor) -> Tensor:
    """The same in torch's operations."""
    return logits.argmax(dim=-1)


def torch_temperature(logits: Tensor) -> Tensor:
    """The same in torch's operations; float32, unseeded."""
    cumulative = (logits.float() / 0.8).softmax(dim=-1).cumsum(dim=-1)
    return torch.searchsorted(cumulative, torch.rand((len(logits), 1), device="cuda"))


def torch_top_p(logits: Tensor) -> Tensor:
    """The same in torch's operations; float32, unseeded."""
    probabilities, order = logits.float().softmax(dim=-1).sort(dim=-1, descending=True)
    cumulative = probabilities.cumsum(dim=-1)
    kept = probabilities.masked_fill(cumulative - probabilities >= 0.9, 0.0).cumsum(dim=-1)
    places = torch.searchsorted(kept, torch.rand((len(logits), 1), device="cuda") * kept[:, -1:])
    return order.gather(-1, places)


TORCH: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "greedy": torch_greedy, "temperature": torch_temperature, "top-p 0.9": torch_top_p,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
