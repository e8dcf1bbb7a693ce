"""vLLM on the workload of the engine's benchmark; runs with vLLM's packages first on the path (see `peers`).

The driver is the peer bundle's own (`bench_vllm.Bench`); here are only the second geometry, the weights, the mixed
load, and a result that is on disk after every figure. Requests are rendered beforehand where ours have their tensors at
hand.

Both engines load the same checkpoint. Weights that vLLM makes up itself (`--weights dummy`) lie within 0.001 of zero:
products of such numbers take less power, and a card at its limit of power then computes faster, whoever's engine it is.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.load import (
    BATCHES,
    MAX_NUM_SEQS,
    MIXED,
    OUTPUT_TOKENS,
    PREFILLS,
    SIDES,
    max_model_len,
    milliseconds,
)
from benchmarks.gpu.session import ROOT, Sheet

BUNDLE = ROOT / ".peer"
PARTS = ("first_token", "decode", "prefill", "mixed")
WEIGHTS = ("checkpoint", "dummy")
FROM_PICTURES = (64, 256)
"""Batches whose requests are also timed from the picture on, as they are where ours are served."""


def main(argv: list[str] | None = None) -> int:
    """Every figure of one geometry, onto the sheet."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.vllm_arm", description=__doc__)
    parser.add_argument("--geometry", default="llava-1.5-7b")
    parser.add_argument("--batches", type=lambda text: tuple(map(int, text.split(","))), default=BATCHES)
    parser.add_argument("--parts", type=lambda text: tuple(text.split(",")), default=PARTS)
    parser.add_argument("--repeats", type=int, default=3, help="of the prefill (default 3)")
    parser.add_argument("--utilization", type=float, default=0.9)
    parser.add_argument("--weights", choices=WEIGHTS, default=WEIGHTS[0], help="ours, or vLLM's own (default: ours)")
    parser.add_argument("--sheet", type=Path, required=True)
    options = parser.parse_args(argv)
    sheet = Sheet(options.sheet)
    arm = Arm(options.geometry, options.utilization, options.weights)
    if not sheet.measure("boot", arm.boot):
        return 1
    sheet.measure("warm_up", arm.warm_up)
    if "first_token" in options.parts:
        sheet.measure("first_token", arm.first_token)
    for batch in options.batches if "decode" in options.parts else ():
        sheet.measure(f"decode_{batch}", lambda b=batch: arm.decode(b))
    if "prefill" in options.parts:
        sheet.measure("prefill", lambda: arm.prefill(options.repeats))
    if "mixed" in options.parts:
        sheet.measure("mixed", arm.mixed)
    return 0


class Arm:
    """One booted vLLM."""

    def __init__(self, geometry: str, utilization: float, weights: str = WEIGHTS[0]) -> None:
        sys.path.insert(0, str(BUNDLE))
        import bench_vllm
        import workload

        self._bench_class: Any = bench_vllm.Bench
        self._workload: Any = workload
        self._geometry, self._side, self._utilization = geometry, SIDES[geometry], utilization
        self._weights = weights
        self._bench: Any = None

    def boot(self) -> dict[str, Any]:
        """As the bundle boots it, but for the geometry and the share."""
        import vllm

        began = time.perf_counter()
        bench = self._bench_class.__new__(self._bench_class)
        bench.uid = 0
        bench.llm = vllm.LLM(
            model=self._folder(), load_format="dummy" if self._weights == "dummy" else "auto", dtype="bfloat16",
            seed=0, max_model_len=max_model_len(self._geometry), max_num_seqs=MAX_NUM_SEQS,
            gpu_memory_utilization=self._utilization, block_size=16, enable_prefix_caching=False,
            mm_processor_cache_gb=0, limit_mm_per_prompt={"image": 1},
        )  # fmt: skip
        bench.boot, bench.engine = time.perf_counter() - began, bench.llm.llm_engine
        self._bench, config = bench, bench.engine.vllm_config
        return {
            "seconds": bench.boot, "weights": self._weights, "num_blocks": config.cache_config.num_gpu_blocks,
            "block_size": config.cache_config.block_size, "version": vllm.__version__,
            "graphs": str(config.compilation_config.cudagraph_mode),
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "async_scheduling": config.scheduler_config.async_scheduling, "versions": self._workload.versions(),
        }  # fmt: skip

    def _folder(self) -> str:
        """The checkpoint that ours loads, which is there by now."""
        from benchmarks.gpu.models import checkpoint_folder

        return str(checkpoint_folder(self._geometry))

    def _prompts(self, count: int, seed: int) -> list[Any]:
        """Rendered, with random pictures of the geometry's size."""
        import numpy as np
        from PIL import Image

        rng = np.random.default_rng(seed)
        size = (self._side, self._side, 3)
        pictures = [Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)) for _ in range(count)]
        return [
            {"prompt_token_ids": [self._workload.IMAGE_TOKEN, *ids], "multi_modal_data": {"image": picture}}
            for ids, picture in zip(self._workload.text(count, seed), pictures, strict=True)
        ]

    def _rendered(self, count: int, seed: int) -> list[Any]:
        return [self._bench.render(prompt) for prompt in self._prompts(count, seed)]

    def warm_up(self) -> dict[str, Any]:
        """A few short requests."""
        self._bench.drive(self._prompts(4, 1), 8, rendered=False)
        return {}

    def first_token(self) -> dict[str, Any]:
        """Milliseconds for lone requests, from pictures and from rendered inputs; the first of each is left out."""
        figures = {}
        for name, rendered in (("median_ms", True), ("from_picture_ms", False)):
            times = []
            for number in range(6):
                make = self._rendered if rendered else self._prompts
                began, _, trace = self._bench.drive(make(1, 900 + number + 10 * rendered), 1, rendered=rendered)
                times.append(1000 * (trace[0][0] - began))
            figures[name], figures[f"{name}_all"] = self._workload.median(times[1:]), times
        return figures

    def decode(self, batch: int) -> dict[str, Any]:
        """Step time while all decode; tokens per second from pictures and from rendered inputs."""
        total, steps, rates = batch * OUTPUT_TOKENS, [], {}
        arms = {"tokens_per_second": True}
        if batch in FROM_PICTURES:
            arms = {"from_picture_tokens_per_second": False, **arms}
        for name, rendered in arms.items():
            inputs = (self._rendered if rendered else self._prompts)(batch, 100 * batch + rendered)
            began, _, trace = self._bench.drive(inputs, OUTPUT_TOKENS, rendered=rendered)
            rates[name] = total / (trace[-1][0] - began)
            for (before, old), (now, fresh) in itertools.pairwise(trace):
                if len(old) == len(fresh) == batch and all(n == 1 and so_far > 2 for n, so_far in fresh.values()):
                    steps.append(now - before)
        figures = {"batch": batch, "step_ms": milliseconds(steps), **rates}
        print(
            f"vllm batch {batch}: step {figures['step_ms'].get('median', float('nan')):.2f} ms, "
            f"{rates['tokens_per_second']:.0f} tokens/s", flush=True,
        )  # fmt: skip
        return figures

    def prefill(self, repeats: int) -> dict[str, Any]:
        """Pictures per second, rendered beforehand."""
        count, seconds = PREFILLS[self._geometry], []
        for number in range(repeats):
            began, _, trace = self._bench.drive(self._rendered(count, 2000 + number), 1, rendered=True)
            seconds.append(trace[-1][0] - began)
        rate = count / self._workload.median(seconds)
        print(f"vllm prefill {rate:.1f} images/s", flush=True)
        return {"images": count, "images_per_second": rate, "seconds_all": seconds}

    def mixed(self) -> dict[str, Any]:
        """Requests that keep arriving while others decode, as `engine_parts.mixed_load`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        count, rate = MIXED[self._geometry]
        pending = [(number / rate, one) for number, one in enumerate(self._rendered(count, 3000))][::-1]
        params = SamplingParams(
            temperature=0.0, max_tokens=OUTPUT_TOKENS, min_tokens=OUTPUT_TOKENS, ignore_eos=True, detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        began, arrived, last = time.perf_counter(), dict[str, float](), dict[str, float]()
        intervals, firsts, engine = list[float](), list[float](), self._bench.engine
        while pending or engine.has_unfinished_requests():
            while pending and time.perf_counter() - began >= pending[-1][0]:
                at, one = pending.pop()
                self._bench.uid += 1
                arrived[str(self._bench.uid)] = began + at
                engine.add_request(str(self._bench.uid), one, params)
            if not engine.has_unfinished_requests():
                time.sleep(0.0002)
                continue
            for output in engine.step():
                now, number = time.perf_counter(), output.request_id
                number = number if number in arrived else number.partition("-")[0]
                if not output.outputs[0].token_ids:
                    continue
                (intervals if number in last else firsts).append(now - last.get(number, arrived[number]))
                last[number] = now
        return {
            "requests": count, "requests_per_second": rate, "token_interval_ms": milliseconds(intervals),
            "first_token_ms": milliseconds(firsts),
            "tokens_per_second": count * OUTPUT_TOKENS / (max(last.values()) - began),
        }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
