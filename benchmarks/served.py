"""The served model against transformers' `generate` on the same pictures, prompts and lengths.

Served: picture files through both services and the generated stub, one request at a time and 16 at once. Reference:
`generate` in this process on the same files, one request after the other, and in static batches of several sizes,
sorted by length. Every request has a picture of its own and a length of its own. Arms alternate; figures are medians
over the repeats, ratios are of the medians. Models: the demo model, with answers of two ranges of lengths, and a random
LLaVA with a 135M-parameter Llama. A picture costs as much in a batch as alone, which bounds what batching can gain: the
bound said is what 16 at once would reach if only the time to the first token were spent.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from tqdm import tqdm

from benchmarks.models import make_random_llava, pictures
from benchmarks.processes import SERVE, started, use_threads
from benchmarks.reference import Reference, Task
from benchmarks.results import make_parser, spread, write_result
from diptych.client.channel import SYNC_CHANNEL_OPTIONS
from diptych.v1 import preprocess_pb2, preprocess_pb2_grpc, tensor_pb2

DEMO_MODEL = Path(__file__).parent.parent / "demo" / "model"
QUESTION = "What does the picture show?"
CONCURRENCY = 16
BATCH_SIZES = (4, 8, 16)
ANSWERS = [(16, 160), (32, 384)]
TARGETS = {"one at a time": 1.0, "against one by one": 3.0, "against the best static batch": 1.0}


def main(argv: list[str] | None = None) -> int:
    """Print and write tokens per second and time to first token of every arm, for both models."""
    parser = make_parser("served", __doc__)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="the first checkpoint directory")
    parser.add_argument("--requests", type=int, default=32, help="requests per measurement (default 32)")
    parser.add_argument("--one-by-one", type=int, default=8, help="requests of the arms without batches (default 8)")
    parser.add_argument(
        "--answers", type=parse_range, nargs="+", default=ANSWERS, metavar="MIN-MAX",
        help="tokens of the shortest and the longest answer (default 16-160 and, with the demo model, 32-384)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3, help="interleaved repeats (default 3)")
    parser.add_argument("--only", choices=("demo", "random"), help="one of the two models")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of every arm (default 1)")
    options = parser.parse_args(argv)
    use_threads(options.threads)
    if options.quick:
        options.requests, options.one_by_one, options.repeats, options.answers = 4, 2, 1, [(2, 4)]
    load_before = os.getloadavg()[0]
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        if options.only in (None, "demo"):
            for shortest, longest in options.answers:
                name = f"demo, {shortest} to {longest} tokens"
                figures[name] = report(name, measure(options.model, (shortest, longest), options), options)
        if options.only in (None, "random"):
            shortest, longest = options.answers[0]
            model = make_random_llava(Path(folder) / "random-135m", options.quick)
            name = f"random, {shortest} to {longest} tokens"
            figures[name] = report(name, measure(model, (shortest, longest), options), options)
    write_result("served", figures, options, load_before)
    return 0


def parse_range(text: str) -> tuple[int, int]:
    """`16-160` -> (16, 160)."""
    shortest, _, longest = text.partition("-")
    return int(shortest), int(longest)


def measure(model: Path, lengths: tuple[int, int], options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Every arm's figures, repeats in turn."""
    reference = Reference(model)
    arms: dict[str, list[dict[str, float]]] = {}
    seeds = itertools.count()
    with (
        started(SERVE, "--model", str(model), "--executor-port", "0") as service,
        grpc.insecure_channel(service.address, options=SYNC_CHANNEL_OPTIONS) as channel,
    ):
        stub = preprocess_pb2_grpc.PreprocessServiceStub(channel)
        ask_all(stub, make_tasks(stub, 2, lengths, next(seeds)), 2)
        reference.generate(make_tasks(stub, 2, lengths, next(seeds)))
        for _ in tqdm(range(options.repeats), desc="repeats", file=sys.stderr):
            few = make_tasks(stub, options.one_by_one, lengths, next(seeds))
            many = make_tasks(stub, options.requests, lengths, next(seeds))
            for arm, figures in measure_once(stub, reference, few, many):
                arms.setdefault(arm, []).append(figures)
    return arms


def measure_once(
    stub: preprocess_pb2_grpc.PreprocessServiceStub, reference: Reference, few: list[Task], many: list[Task]
) -> Any:
    """(arm, figures) of every arm; no picture is ever sent twice."""
    yield "generate, one by one", rate(few, reference.run(few))
    yield "served, one at a time", ask_all(stub, few, 1)
    yield f"served, {CONCURRENCY} at once", ask_all(stub, many, CONCURRENCY)
    for size in BATCH_SIZES:
        yield f"generate, batches of {size}", rate(many, reference.run(many, size))


def make_tasks(
    stub: preprocess_pb2_grpc.PreprocessServiceStub, count: int, lengths: tuple[int, int], seed: int
) -> list[Task]:
    """Tasks with lengths spread evenly between the bounds, in random order."""
    files = pictures(count, 240, 320, seed)
    step = (lengths[1] - lengths[0]) / max(count - 1, 1)
    spread_evenly = [lengths[0] + round(index * step) for index in range(count)]
    random.Random(seed).shuffle(spread_evenly)
    ids = stub.Plan(preprocess_pb2.PlanRequest(chat=make_chat(files[0]))).prompt_token_ids
    return [Task(file, ids, length) for file, length in zip(files, spread_evenly, strict=True)]


def make_chat(file: bytes) -> preprocess_pb2.Chat:
    """A question about a picture."""
    media = preprocess_pb2.Media(modality=tensor_pb2.MODALITY_IMAGE, data=file)
    parts = [preprocess_pb2.ChatPart(media=media), preprocess_pb2.ChatPart(text=QUESTION)]
    return preprocess_pb2.Chat(messages=[preprocess_pb2.ChatMessage(role="user", parts=parts)])


def rate(tasks: list[Task], seconds: float) -> dict[str, float]:
    """Tokens that were asked for, per second, and seconds per request."""
    return {
        "tokens_per_second": sum(task.max_tokens for task in tasks) / seconds,
        "seconds_per_request": seconds / len(tasks),
    }


def ask_all(stub: preprocess_pb2_grpc.PreprocessServiceStub, tasks: list[Task], concurrency: int) -> dict[str, float]:
    """Tokens per second over all requests, and the median time to the first token in seconds."""
    start = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        first = list(pool.map(lambda task: ask(stub, task), tasks))
    return {**rate(tasks, time.perf_counter() - start), "ttft": statistics.median(first)}


def ask(stub: preprocess_pb2_grpc.PreprocessServiceStub, task: Task) -> float:
    """One request; its time to the first token in seconds."""
    request = preprocess_pb2.GenerateRequest(
        chat=make_chat(task.file),
        sampling=tensor_pb2.SamplingParams(temperature=0, max_tokens=task.max_tokens, ignore_eos=True),
    )
    start, first, count = time.perf_counter(), None, 0
    for response in stub.Generate(request, timeout=600):
        if response.token_ids and first is None:
            first = time.perf_counter() - start
        count += len(response.token_ids)
    assert count == task.max_tokens
    assert first is not None
    return first


def report(name: str, arms: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> dict[str, Any]:
    """A line per arm, the ratios, and what goes into the JSON file."""
    figures: dict[str, Any] = {
        arm: {key: spread([run[key] for run in runs]) for key in runs[0]} for arm, runs in arms.items()
    }
    rates = {arm: values["tokens_per_second"]["median"] for arm, values in figures.items()}
    for arm, values in figures.items():
        print(f"{name}: {arm:<24} {rates[arm]:8.1f} tokens/s", end="")
        print(f"  first token {1000 * values['ttft']['median']:7.1f} ms" if "ttft" in values else "")
    best = max((arm for arm in rates if "batches" in arm), key=rates.__getitem__)
    batched, one_by_one = rates[f"served, {CONCURRENCY} at once"], rates["generate, one by one"]
    ratios = {
        "one at a time": rates["served, one at a time"] / one_by_one,
        "against one by one": batched / one_by_one,
        "against the best static batch": batched / rates[best],
    }
    for what, ratio in ratios.items():
        print(f"{name}: {what:<30} {ratio:5.2f}x of at least {TARGETS[what]:g}x")
    bound = (
        figures["generate, one by one"]["seconds_per_request"]["median"]
        / (figures["served, one at a time"]["ttft"]["median"])
    )
    print(f"{name}: {'against one by one, bound':<30} {bound:5.2f}x")
    met = {} if options.quick else {what: ratio >= TARGETS[what] for what, ratio in ratios.items()}
    return {
        "arms": figures, "best_static_batch": best, "ratios": ratios, "bound against one by one": bound,
        "targets": TARGETS, "met": met,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
