"""What a request without pictures waits for on a stream that is full of other requests' pixels.

One `Execute` stream, sent by the preprocess service's own sender, to an executor whose engine answers at once. Text
requests follow one another, alone on the stream, beside requests of 16 pictures each at a rate that several decoding
cores make, and beside as many as the stream takes, when both ends' event loops have no time left; the arms take turns.
Beside the difference stands how long the pixels on their way take to send: what a text request would wait if the
stream carried its messages in the order in which they were made.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from tqdm import tqdm

from benchmarks.models import make_random_llava
from benchmarks.processes import STAND_IN_EXECUTOR, started
from benchmarks.results import make_parser, spread, write_result
from benchmarks.stand_in_engine import QUIET_VARIABLE
from diptych.service.lifecycle import CHANNEL_OPTIONS
from preprocess_service.executor_client.request import Completed, MissingItems, RemoteRequest, TokenOutput
from preprocess_service.executor_client.stream import ExecutorStream
from registry import MediaLimits
from registry.families import open_family
from registry.fingerprint import fingerprint
from tests.executor_service.peer import Planned, Planner

SIDE = 336
PICTURES = 16
SETTLE_SECONDS = 0.3
ALONE, PACED, FLOODED = "text alone", "text beside pixels", "text in a flood of pixels"


@dataclass
class Pixels:
    """Bytes of tensors whose requests are complete, and the seconds in which they were sent."""

    num_bytes: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.num_bytes / self.seconds


def main(argv: list[str] | None = None) -> int:
    """Print and write the time to first token of both arms."""
    parser = make_parser("shared_stream", __doc__)
    parser.add_argument("--rounds", type=int, default=10, help="turns of each arm (default 10)")
    parser.add_argument("--asks", type=int, default=50, help="text requests a turn (default 50)")
    parser.add_argument("--uploads", type=int, default=8, help="requests with pictures on their way (default 8)")
    parser.add_argument("--rate", type=float, default=100, help="MB/s of pixels that are not a flood (default 100)")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.asks, options.uploads = 1, 3, 2
    load_before = os.getloadavg()[0]
    os.environ[QUIET_VARIABLE] = "0"
    limits = MediaLimits({"image": PICTURES})
    with tempfile.TemporaryDirectory() as folder:
        model = make_random_llava(Path(folder) / "random", is_small=True, image_size=SIDE)
        family = open_family(model, limits)
        planner = Planner(family, fingerprint(family).digest)
        text, large = planner.plan("How are you?", ()), planner.plan("<image>" * PICTURES, ((SIDE, SIDE),) * PICTURES)
        flags = ("--model", str(model), "--limit-mm-per-prompt", f"image={PICTURES}")
        with started(STAND_IN_EXECUTOR, *flags) as executor:
            seconds, pixels = asyncio.run(measure(executor.address, text, large, options))
    report(seconds, pixels, options.uploads * num_bytes(large), options, load_before)
    return 0


async def measure(
    address: str, text: Planned, large: Planned, options: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, Pixels]]:
    """All arms in turn on one stream: seconds to first token, and how fast pixels were sent meanwhile."""
    arms: dict[str, list[float]] = {ALONE: [], PACED: [], FLOODED: []}
    pixels = {PACED: Pixels(), FLOODED: Pixels()}
    rates = {PACED: 1e6 * options.rate, FLOODED: float("inf")}
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        stream = ExecutorStream(channel, address, closes_when_idle=False, on_sent=lambda _: None)
        for _ in tqdm(range(options.rounds), desc="rounds", file=sys.stderr):
            arms[ALONE] += [await ask(stream, text) for _ in range(options.asks)]
            for arm, counted in pixels.items():
                async with uploading(stream, large, options.uploads, rates[arm], counted):
                    arms[arm] += [await ask(stream, text) for _ in range(options.asks)]
        await stream.close()
    return arms, pixels


async def ask(stream: ExecutorStream, text: Planned) -> float:
    """Seconds from a text request's Start to its first token."""
    began = time.perf_counter()
    request = stream.start(text.start)
    await until(request, TokenOutput)
    seconds = time.perf_counter() - began
    request.release()
    return seconds


@contextlib.asynccontextmanager
async def uploading(
    stream: ExecutorStream, large: Planned, count: int, rate: float, pixels: Pixels
) -> AsyncIterator[None]:
    """So many senders of requests with pictures, at most `rate` bytes per second in all."""
    is_over = asyncio.Event()

    async def upload(number: int) -> None:
        await asyncio.sleep(num_bytes(large) / rate * number)
        while not is_over.is_set():
            began = time.perf_counter()
            request = stream.start(large.start)
            await until(request, MissingItems)
            for index, tensor in enumerate(large.tensors):
                request.send_tensor(index, 0, tensor)
            await until(request, Completed)
            pixels.num_bytes += num_bytes(large)
            await asyncio.sleep(max(0.0, num_bytes(large) / rate * count - (time.perf_counter() - began)))

    tasks = [asyncio.create_task(upload(number)) for number in range(count)]
    began = time.perf_counter()
    await asyncio.sleep(SETTLE_SECONDS)
    yield
    is_over.set()
    await asyncio.gather(*tasks)
    pixels.seconds += time.perf_counter() - began


async def until(request: RemoteRequest, kind: type[Any]) -> None:
    """Read a request's events up to the first of a kind."""
    while not any(isinstance(event, kind) for event in await request.next_events()):
        pass


def num_bytes(planned: Planned) -> int:
    """Bytes of a request's tensors."""
    return sum(tensor.nbytes for tensor in planned.tensors)


def report(
    seconds: dict[str, list[float]],
    pixels: dict[str, Pixels],
    in_flight: int,
    options: argparse.Namespace,
    load_before: float,
) -> None:
    """A line per arm, and the JSON file."""
    figures: dict[str, Any] = {arm: _milliseconds(values) for arm, values in seconds.items()}
    rate = pixels[FLOODED].rate
    figures["pixels"] = {
        "bytes_per_second": {arm: counted.rate for arm, counted in pixels.items()},
        "bytes_on_their_way": in_flight,
        "milliseconds_to_send_them": 1000 * in_flight / rate,
    }
    for arm in seconds:
        median, p99 = figures[arm]["median"], figures[arm]["p99"]
        print(f"{arm:<26} {median:6.2f} ms to the first token, 99 of 100 within {p99:.2f}")
    print(f"pixels in a flood: {rate / 1e6:.0f} MB/s, beside: {pixels[PACED].rate / 1e6:.0f} MB/s", end="; ")
    print(f"on their way: {in_flight / 1e6:.0f} MB, which take {1000 * in_flight / rate:.0f} ms to send")
    write_result("shared_stream", figures, options, load_before)


def _milliseconds(values: list[float]) -> dict[str, float]:
    scaled = [1000 * value for value in values]
    return {**spread(scaled), "p99": statistics.quantiles(scaled, n=100)[98]}


if __name__ == "__main__":
    sys.exit(main())
