"""What the card's limit of power leaves of its clock: products, attention and a plain stream, a while each.

A card at its limit lowers its clock, and then whatever costs energy costs time, though nothing waits for it. So every
load runs for a while: its time in the first replay after a pause, when there is power enough, and over the rest,
with the mean power and the mean and lowest clock of that. Power is NVML's counter of energy over the time.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

import torch

from benchmarks.gpu import decode_attention, small_linear
from benchmarks.gpu.options import parse_for_gpu
from benchmarks.gpu.timing import CEILING_BYTES
from benchmarks.results import make_parser, write_result
from executor_service.kernels.cuda.module import LONG, POINTER, kernel, num_multiprocessors

GEOMETRY: Final = "mistral-7b"
ROWS: Final = (16, 64, 96, 128)
POINTS: Final = ((32, 32, 2048, 64), (32, 8, 8192, 64), (32, 8, 2944, 128))
"""Of attention: query heads, key heads, tokens, requests."""
SECONDS: Final = 1.0
"""Of a load: NVML adds to its counter of energy some ten times a second."""
WARM_SECONDS, PAUSE_SECONDS, BURST_SECONDS, SAMPLE_SECONDS = 0.3, 0.3, 0.02, 0.02
_CLOCK_OF_MULTIPROCESSORS: Final = 1


def main(argv: list[str] | None = None) -> int:
    """Print and write milliseconds, watts and megahertz of every load."""
    options = parse_for_gpu(make_parser("gpu.power", __doc__), argv)
    load_before = os.getloadavg()[0]
    card, seconds = Card(), 0.1 if options.quick else SECONDS
    figures: dict[str, object] = {"device": torch.cuda.get_device_name(), "limit_watts": card.limit_watts()}
    for name, replay in loads(options.quick):
        figures[name] = found = watch(card, replay, seconds)
        print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in found.items()), flush=True)
        torch.cuda.empty_cache()
    write_result("gpu_power", figures, options, load_before)
    return 0


def loads(is_quick: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Names, and replays of a graph each, made as they are asked for."""
    yield f"read {CEILING_BYTES >> 30} GiB", read_stream()
    layers = [small_linear.make_layer(*small_linear.GEOMETRIES[GEOMETRY]) for _ in range(small_linear.LAYERS)]
    for rows in ROWS[:1] if is_quick else ROWS:
        x = small_linear.normal(rows, small_linear.WIDTH)
        for arm, chain in (("small_linear", small_linear.our_chain), ("cublas", small_linear.cublas_chain)):
            yield f"{GEOMETRY}, {rows} rows, {arm}", small_linear.captured(partial(chain, layers, x)).replay
    del layers
    for point in (decode_attention.Point(*sizes) for sizes in (POINTS[:1] if is_quick else POINTS)):
        for arm, call in (("ours", decode_attention.our_call(point)), ("cudnn", decode_attention.cudnn_call(point))):
            call(0)
            yield f"{point.name}, {arm}", decode_attention.captured(call, point.copies).replay


def read_stream() -> Callable[[], None]:
    """Our own kernel that only reads, on random data."""
    data = torch.randint(-(1 << 31), 1 << 31, (CEILING_BYTES // 8,), dtype=torch.int64, device="cuda")
    blocks = 2 * num_multiprocessors(0)
    sums = torch.zeros(blocks, dtype=torch.int32, device="cuda")
    launch = kernel("streams", "read_stream", (POINTER, POINTER, LONG))
    return lambda: launch((blocks,), 512, data, sums, CEILING_BYTES // 16)


def watch(card: Card, replay: Callable[[], None], seconds: float) -> dict[str, float]:
    """One load; milliseconds are of one replay."""
    torch.cuda.synchronize()
    time.sleep(PAUSE_SECONDS)
    first = milliseconds(replay, 1)
    count = max(1, round(1000 * BURST_SECONDS / milliseconds(replay, 2)))
    repeated(replay, count, WARM_SECONDS)
    with Clocks(card) as clocks:
        joules, began = card.joules(), time.perf_counter()
        times = repeated(replay, count, seconds)
        watts = (card.joules() - joules) / (time.perf_counter() - began)
    return {
        "first_ms": first, "ms": statistics.mean(times), "watts": watts,
        "mhz": statistics.mean(clocks.samples), "lowest_mhz": min(clocks.samples),
    }  # fmt: skip


def repeated(replay: Callable[[], None], count: int, seconds: float) -> list[float]:
    """Milliseconds of a replay, of bursts of `count`, for so long."""
    end, times = time.perf_counter() + seconds, list[float]()
    while not times or time.perf_counter() < end:
        times.append(milliseconds(replay, count))
    return times


def milliseconds(replay: Callable[[], None], count: int) -> float:
    """Of each of `count` replays."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / count


class Card:
    """What NVML says of the first GPU; OSError if the driver does not bring it, RuntimeError if it refuses."""

    def __init__(self) -> None:
        self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
        self._device = ctypes.c_void_p()
        self._ask("Init_v2")
        self._ask("DeviceGetHandleByIndex_v2", 0, ctypes.byref(self._device))

    def joules(self) -> float:
        """Since the driver was loaded."""
        value = ctypes.c_ulonglong()
        self._ask("DeviceGetTotalEnergyConsumption", self._device, ctypes.byref(value))
        return value.value / 1000

    def megahertz(self) -> int:
        """Of the multiprocessors, now."""
        value = ctypes.c_uint()
        self._ask("DeviceGetClockInfo", self._device, _CLOCK_OF_MULTIPROCESSORS, ctypes.byref(value))
        return value.value

    def limit_watts(self) -> float:
        """That the card keeps to."""
        value = ctypes.c_uint()
        self._ask("DeviceGetEnforcedPowerLimit", self._device, ctypes.byref(value))
        return value.value / 1000

    def _ask(self, name: str, *arguments: object) -> None:
        status = getattr(self._nvml, f"nvml{name}")(*arguments)
        if status:
            raise RuntimeError(f"NVML's {name} failed with status {status}")


class Clocks:
    """Samples of the clock while it is entered."""

    def __init__(self, card: Card) -> None:
        self.samples: list[int] = []
        self._card = card
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Clocks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        self.samples.append(self._card.megahertz())
        while not self._ended.wait(SAMPLE_SECONDS):
            self.samples.append(self._card.megahertz())


if __name__ == "__main__":
    sys.exit(main())
