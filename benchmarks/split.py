"""What it costs to be two services: time to the first token against the engine called directly, one picture.

Pairs in turn, both arms with the same picture, which neither has seen before: once through both services and the
generated stub, once in this process, which reads the checkpoint, plans, decodes and maps with the same functions and
calls `Engine.step` itself. So only gRPC, the front, its digests and the pipe differ. One output token.

The preprocess service has half of the cores to itself, everything else the other half, the direct arm too. Left alone,
a kernel may run threads that sleep often on one core, and so both services, however idle the others are. With
`--real-time` nothing is kept apart, and the scheduler gives every thread that wakes up an idle core.

On a CPU the model's work is fifty times the difference and varies by as much, from request to request and from process
to process. So the difference is also told outside of prefill, and the same is measured without a model: the services
with a stand-in engine, against plan, decode and map. There the caches of the processor are warm.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import torch
from tqdm import tqdm

from benchmarks.models import pictures
from benchmarks.processes import EXECUTOR, PREPROCESS, STAND_IN_EXECUTOR, Service, started, use_threads
from benchmarks.results import make_parser, spread, write_result
from benchmarks.stand_in_engine import QUIET_VARIABLE
from diptych.client.channel import SYNC_CHANNEL_OPTIONS
from diptych.v1 import preprocess_pb2, preprocess_pb2_grpc, tensor_pb2
from executor_service.engine.boot import boot
from executor_service.engine.messages import SamplingParams
from executor_service.engine.request import EngineItem, Request
from executor_service.settings import ExecutorSettings
from preprocess_service.media.decode import decode_image
from preprocess_service.planning import Checkpoint, Planner, RequestLimits
from preprocess_service.requests import Chat, ChatMessage, Media
from registry import MediaItem

DEMO_MODEL = Path(__file__).parent.parent / "demo" / "model"
QUESTION = "What does the picture show?"
TARGET_MS = 3.0
PAUSE_SECONDS = 0.005
GPU_SHARE = 0.3
STAGES = ("plan", "decode_media", "map", "transfer", "queue", "prefill")


def main(argv: list[str] | None = None) -> int:
    """Print and write the milliseconds of both arms, and of their difference."""
    parser = make_parser("split", __doc__)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="checkpoint directory")
    parser.add_argument("--pairs", type=int, default=300, help="interleaved pairs (default 300)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of every arm (default 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of both arms' model (default cpu)")
    parser.add_argument("--real-time", action="store_true", help="real-time priority on all cores (needs privileges)")
    options = parser.parse_args(argv)
    if options.real_time:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))  # which threads and processes inherit
    use_threads(options.threads)
    if options.quick:
        options.pairs = 3
    load_before = os.getloadavg()[0]
    settings = engine_settings(options)
    with two_services(EXECUTOR, options, settings) as service:
        figures = report("demo model", measure(Direct(options.model, settings), service.address, options.pairs))
    os.environ[QUIET_VARIABLE] = "0"
    with two_services(STAND_IN_EXECUTOR, options, {}) as service:
        pairs = measure(WithoutModel(options.model), service.address, options.pairs)
        figures["without_a_model"] = report("no model", pairs)
    if not options.quick:
        figures["target"] = {"milliseconds": TARGET_MS, "met": figures["difference_ms"]["median"] <= TARGET_MS}
    write_result("split", figures, options, load_before)
    return 0


def engine_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Of both arms' engines beside the model; they share the memory of a GPU."""
    on_gpu = {"gpu_memory_utilization": GPU_SHARE} if options.device == "cuda" else {}
    return {"device": options.device, **on_gpu}


@contextlib.contextmanager
def two_services(
    executor_module: tuple[str, ...], options: argparse.Namespace, settings: dict[str, Any]
) -> Iterator[Service]:
    """The preprocess service in front of an executor; what runs in the block has the executor's cores."""
    cores = sorted(os.sched_getaffinity(0))
    half = 0 if options.real_time else len(cores) // 2
    ours, preprocess = cores[half:], cores[:half] or cores
    flags = ("--model", str(options.model))
    engine_flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    try:
        os.sched_setaffinity(0, ours)
        with started(executor_module, *flags, *engine_flags) as executor:
            os.sched_setaffinity(0, preprocess)  # which a process that is started inherits
            with started(PREPROCESS, *flags, "--executor", executor.address) as service:
                os.sched_setaffinity(0, ours)
                yield service
    finally:
        os.sched_setaffinity(0, cores)


Stages = dict[str, float]
"""Milliseconds by stage; `first_token` is the whole."""


def measure(direct: Direct | WithoutModel, address: str, num_pairs: int) -> list[tuple[Stages, Stages]]:
    """(direct, served) of every pair; who goes first changes from pair to pair."""
    warm_up = min(10, num_pairs)
    files = pictures(num_pairs + warm_up, 240, 320)
    pairs = []
    with grpc.insecure_channel(address, options=SYNC_CHANNEL_OPTIONS) as channel:
        served = Served(preprocess_pb2_grpc.PreprocessServiceStub(channel))
        for index in tqdm(range(num_pairs + warm_up), desc="pairs", file=sys.stderr):
            results, file = {}, files.pop()
            arms = (direct, served) if index % 2 else (served, direct)
            for arm in arms:
                time.sleep(PAUSE_SECONDS)  # so that no thread of the other arm still spins
                results[arm] = arm.ask(file)
            pairs.append((results[direct], results[served]))
    return pairs[warm_up:]


class Served:
    """Both services."""

    def __init__(self, stub: preprocess_pb2_grpc.PreprocessServiceStub) -> None:
        self._stub = stub

    def ask(self, file: bytes) -> Stages:
        """One request."""
        start = time.perf_counter()
        media = preprocess_pb2.Media(modality=tensor_pb2.MODALITY_IMAGE, data=file)
        parts = [preprocess_pb2.ChatPart(media=media), preprocess_pb2.ChatPart(text=QUESTION)]
        request = preprocess_pb2.GenerateRequest(
            chat=preprocess_pb2.Chat(messages=[preprocess_pb2.ChatMessage(role="user", parts=parts)]),
            sampling=tensor_pb2.SamplingParams(temperature=0, max_tokens=1, ignore_eos=True),
        )
        first, times = None, None
        for response in self._stub.Generate(request, timeout=60):
            if response.token_ids and first is None:
                first = time.perf_counter() - start
            times = response.final.times if response.HasField("final") else times
        assert first is not None
        return {"first_token": 1000 * first, **{name: 1000 * getattr(times, f"{name}_seconds") for name in STAGES}}


class WithoutModel:
    """The preprocess service's part of the work in this process."""

    def __init__(self, model: Path, max_model_len: int | None = None) -> None:
        self._checkpoint = Checkpoint(model)
        limits = RequestLimits(self._checkpoint.family.ctx.limits, max_model_len)
        self._planner = Planner(self._checkpoint, lambda: limits)

    def ask(self, file: bytes) -> Stages:
        """One request."""
        clock = _Clock()
        plan = self._planner.prepare(Chat((ChatMessage("user", (Media("image", file), QUESTION)),)))
        clock.note("plan")
        pixels = decode_image(plan.items[0], 0)
        clock.note("decode_media")
        tensors = self._checkpoint.family.map_item(MediaItem(plan.items[0].info, pixels))
        clock.note("map")
        self._checkpoint.tokenizer.decode(self._generate(plan, tensors))
        clock.note("prefill")
        return clock.stages()

    def _generate(self, plan: Any, tensors: dict[str, Any]) -> list[int]:
        """The one output token."""
        return [plan.prompt_token_ids[-1]]


class Direct(WithoutModel):
    """All of the work in this process."""

    def __init__(self, model: Path, settings: dict[str, Any]) -> None:
        booted = boot(ExecutorSettings(model=model, **settings).engine_config, lambda progress: None)
        self._engine, self._max_model_len = booted.engine, booted.report.max_model_len
        super().__init__(model, self._max_model_len)
        self._number = 0

    def _generate(self, plan: Any, tensors: dict[str, Any]) -> list[int]:
        self._engine.add(self._request(plan, tensors))
        token_ids: list[int] = []
        while self._engine.has_work:
            token_ids += self._engine.step().tokens.token_ids
        assert len(token_ids) == 1
        return token_ids

    def _request(self, plan: Any, tensors: dict[str, Any]) -> Request:
        """The request as the engine process makes it; a digest of its own lets the caches do the same work."""
        self._number += 1
        item = plan.items[0]
        assert item.layout is not None
        views = {name: torch.from_numpy(array) for name, array in tensors.items()}
        digest = hashlib.sha256(str(self._number).encode()).digest()
        engine_item = EngineItem(item.placeholder, "image", item.layout, views, content_digest=digest)
        positions, delta = self._engine.runner.prompt_positions(plan.prompt_token_ids, [engine_item])
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        return Request(
            self._number, plan.prompt_token_ids, [engine_item], params, self._max_model_len,
            positions=positions, decode_delta=delta,
        )  # fmt: skip


class _Clock:
    """Milliseconds since the last note, by stage."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._stages: Stages = {}

    def note(self, stage: str) -> None:
        now = time.perf_counter()
        self._stages[stage] = 1000 * (now - self._last)
        self._last = now

    def stages(self) -> Stages:
        """The whole first."""
        return {"first_token": 1000 * (self._last - self._start), **self._stages}


def report(name: str, pairs: list[tuple[Stages, Stages]]) -> dict[str, Any]:
    """Prints the difference and both arms by stage; returns what goes into the JSON file."""
    differences = [served["first_token"] - direct["first_token"] for direct, served in pairs]
    outside = [
        difference - served["prefill"] + direct["prefill"]
        for difference, (direct, served) in zip(differences, pairs, strict=True)
    ]
    figures: dict[str, Any] = {"difference_ms": spread(differences), "difference_outside_prefill_ms": spread(outside)}
    for place, arm in enumerate(("direct", "served")):
        figures[f"{arm}_ms"] = {stage: spread([pair[place][stage] for pair in pairs]) for stage in pairs[0][place]}
        stages = ", ".join(f"{stage} {value['median']:.2f}" for stage, value in figures[f"{arm}_ms"].items())
        print(f"{name}: {arm:<7} {stages}  (median ms)")
    quarter = sorted(pairs, key=lambda pair: sum(arm["first_token"] for arm in pair))[: max(len(pairs) // 4, 1)]
    figures["difference_ms_of_quietest_quarter"] = statistics.median(
        served["first_token"] - direct["first_token"] for direct, served in quarter
    )
    median, quietest = figures["difference_ms"]["median"], figures["difference_ms_of_quietest_quarter"]
    print(
        f"{name}: the split costs {median:.2f} ms at the median, {statistics.median(outside):.2f} outside of prefill, "
        f"{quietest:.2f} in the quickest quarter of pairs"
    )
    return figures


if __name__ == "__main__":
    sys.exit(main())
