"""Tokens per second of the executor's front, and of `Generate`, when the engine costs nothing.

A stand-in engine process gives 256 requests a token each per step, as fast as its pipe takes them. One arm reads
them as an `Execute` stream does, the other asks both services with as many `Generate` calls at once. The processor
time of each process says what limits the figure; the machine's cores are shared by all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import grpc

from benchmarks.processes import (
    PREPROCESS,
    STAND_IN_EXECUTOR,
    Service,
    child_of,
    processor_seconds,
    started,
)
from benchmarks.results import make_parser, spread, write_result
from diptych.service.lifecycle import CHANNEL_OPTIONS
from diptych.v1 import executor_pb2, executor_pb2_grpc, preprocess_pb2, preprocess_pb2_grpc, tensor_pb2

DEMO_MODEL = Path(__file__).parent.parent / "demo" / "model"
TARGET = 500_000
PROMPT = "Hello"


def main(argv: list[str] | None = None) -> int:
    """Print and write tokens per second of both arms."""
    parser = make_parser("token_stream", __doc__)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="checkpoint directory; its weights are not read")
    parser.add_argument("--requests", type=int, default=256, help="requests on the stream (default 256)")
    parser.add_argument("--stream-tokens", type=int, default=6000, help="tokens of each of them (default 6000)")
    parser.add_argument("--generate-tokens", type=int, default=200, help="tokens of each Generate call (default 200)")
    parser.add_argument("--repeats", type=int, default=7, help="interleaved repeats (default 7)")
    options = parser.parse_args(argv)
    if options.quick:
        options.requests, options.stream_tokens, options.generate_tokens, options.repeats = 4, 50, 5, 1
    load_before = os.getloadavg()[0]
    arms = asyncio.run(measure(options))
    report(arms, options, load_before)
    return 0


async def measure(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Both arms in turn, on the same executor."""
    model = ("--model", str(options.model))
    arms: dict[str, list[dict[str, float]]] = {"Execute": [], "Generate": []}
    with started(STAND_IN_EXECUTOR, *model) as executor:
        flags = (*model, "--executor", executor.address, "--max-pending-requests", "1024")
        with started(PREPROCESS, *flags) as preprocess:
            processes = _processes(executor, preprocess)
            async with (
                grpc.aio.insecure_channel(executor.address, options=CHANNEL_OPTIONS) as executor_channel,
                grpc.aio.insecure_channel(preprocess.address, options=CHANNEL_OPTIONS) as preprocess_channel,
            ):
                start = await first_message(executor_channel, preprocess_channel)
                for _ in range(options.repeats):
                    start.sampling.max_tokens = options.stream_tokens
                    arms["Execute"].append(await measured(read_stream(executor_channel, start, options), processes))
                    generate = read_answers(preprocess_channel, options)
                    arms["Generate"].append(await measured(generate, processes))
    return arms


def _processes(executor: Service, preprocess: Service) -> dict[str, int]:
    engine = child_of(executor.pid)
    return {"front": executor.pid, "engine": engine, "preprocess": preprocess.pid, "client": os.getpid()}


async def first_message(executor: grpc.aio.Channel, preprocess: grpc.aio.Channel) -> executor_pb2.Start:
    """A short prompt's Start, as the executor takes it."""
    model = await executor_pb2_grpc.ExecutorServiceStub(executor).GetModel(executor_pb2.GetModelRequest())
    stub = preprocess_pb2_grpc.PreprocessServiceStub(preprocess)
    tokens = await stub.Tokenize(preprocess_pb2.TokenizeRequest(text=PROMPT))
    return executor_pb2.Start(
        fingerprint=model.fingerprint.digest,
        prompt_token_ids=tokens.token_ids,
        sampling=tensor_pb2.SamplingParams(temperature=0, ignore_eos=True),
    )


async def measured(tokens: Any, processes: dict[str, int]) -> dict[str, float]:
    """Tokens per second of a coroutine that returns (tokens, seconds), and every process's share of a core."""
    before, start = {name: processor_seconds(pid) for name, pid in processes.items()}, time.perf_counter()
    count, seconds = await tokens
    wall = time.perf_counter() - start
    used = {name: processor_seconds(pid) - before[name] for name, pid in processes.items()}
    return {
        "tokens_per_second": count / seconds,
        **{f"{name}_cores": share / wall for name, share in used.items()},
        **{f"{name}_us_per_token": 1e6 * share / count for name, share in used.items()},
    }


async def read_stream(
    channel: grpc.aio.Channel, start: executor_pb2.Start, options: argparse.Namespace
) -> tuple[int, float]:
    """All tokens of one shared stream, and the seconds from when it has every Start to its last Final."""
    call = executor_pb2_grpc.ExecutorServiceStub(channel).Execute()
    for handle in range(1, options.requests + 1):
        await call.write(executor_pb2.ExecuteRequest(handle=handle, start=start))
    await call.done_writing()
    count, began = 0, time.perf_counter()
    async for response in call:
        kind = response.WhichOneof("message")
        if kind == "step_outputs":
            count += len(response.step_outputs.token_ids)
        elif kind == "final":
            assert response.final.WhichOneof("outcome") == "completion", response.final
    seconds = time.perf_counter() - began
    assert count == options.requests * options.stream_tokens
    return count, seconds


async def read_answers(channel: grpc.aio.Channel, options: argparse.Namespace) -> tuple[int, float]:
    """All tokens of as many Generate calls at once, and the seconds they take together."""
    stub = preprocess_pb2_grpc.PreprocessServiceStub(channel)
    request = preprocess_pb2.GenerateRequest(
        prompt=preprocess_pb2.Prompt(text=PROMPT),
        sampling=tensor_pb2.SamplingParams(temperature=0, max_tokens=options.generate_tokens, ignore_eos=True),
    )
    began = time.perf_counter()

    async def read() -> int:
        count = 0
        async for response in stub.Generate(request):
            count += len(response.token_ids)
        return count

    counts = await asyncio.gather(*(read() for _ in range(options.requests)))
    seconds = time.perf_counter() - began
    assert set(counts) == {options.generate_tokens}
    return sum(counts), seconds


def report(arms: dict[str, list[dict[str, float]]], options: argparse.Namespace, load_before: float) -> None:
    """A line per arm, and the JSON file."""
    figures: dict[str, Any] = {}
    for arm, runs in arms.items():
        rates = [run["tokens_per_second"] for run in runs]
        processes = {
            name: statistics.median(run[name] for run in runs) for name in runs[0] if "_per_second" not in name
        }
        figures[arm] = {"tokens_per_second": {**spread(rates), "max": max(rates)}, **processes}
        print(f"{arm:<9} {statistics.median(rates):9.0f} tokens/s (best {max(rates):.0f})", end="; ")
        print(", ".join(f"{name} {value:.2f}" for name, value in processes.items()))
    rate = figures["Execute"]["tokens_per_second"]["median"]
    if not options.quick:
        figures["target"] = {"tokens_per_second": TARGET, "ratio": rate / TARGET, "met": rate >= TARGET}
    write_result("token_stream", figures, options, load_before)


if __name__ == "__main__":
    sys.exit(main())
