"""The worst load that is admitted, against what the boot profile has predicted."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.gpu.load import SIDES
from benchmarks.gpu.session import Sheet, used_bytes
from benchmarks.gpu.workload import Driver
from executor_service.engine.messages import MemoryLedger
from registry import MediaInfo

OUTPUT_TOKENS: Final = 16


def worst_load(model: Path, geometry: str, config: dict[str, Any], sheet: Sheet) -> dict[str, Any]:
    """As many requests as may run, each with the largest picture and at full length in the end.

    Bytes by the driver's count (of all processes on the GPU, less what was in use before), and by torch's own.
    """
    before = used_bytes()
    driver = Driver(model, **config)
    ledger = driver.booted.report.ledger
    sheet.note("ledger", asdict(ledger))
    sheet.note("driver_bytes_before", before)
    sheet.note("driver_bytes_after_boot", used_bytes() - before)
    largest = driver.family.find_largest("image", "length")
    side = SIDES[geometry]
    length = driver.booted.report.max_model_len
    text = length - OUTPUT_TOKENS - driver.family.layout(MediaInfo.image(side, side)).length
    requests = driver.requests(config["max_num_seqs"], side, OUTPUT_TOKENS, seed=5, text_tokens=text)
    if driver.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    driver.engine.step = _watched(driver.engine.step, peak := [0])  # type: ignore[method-assign]
    trace = driver.drive(requests)
    predicted = predicted_bytes(ledger)
    peak[0] = max(peak[0] - before, 0)
    figures = {
        "requests": len(requests), "tokens_each": length, "largest_image": [largest.height, largest.width],
        "image_side": side, "seconds": trace.seconds, "num_preemptions": driver.engine.load.num_preemptions,
        "predicted_bytes": predicted, "driver_bytes_peak": peak[0], "driver_over_predicted": peak[0] / predicted,
        "share_bytes": ledger.total_bytes * ledger.gpu_memory_utilization,
        "torch": torch_bytes() if driver.is_cuda else None,
    }  # fmt: skip
    print(f"worst load: driver says {peak[0] / 1e9:.2f} GB, the ledger {predicted / 1e9:.2f} GB", flush=True)
    return figures


def predicted_bytes(ledger: MemoryLedger) -> int:
    """Everything in the ledger; of the two peaks the larger, since they are not at the same time."""
    peak = max(ledger.vision_peak_bytes, ledger.language_peak_bytes)
    return ledger.weights_bytes + peak + ledger.graphs_bytes + ledger.other_bytes + ledger.kv_cache_bytes


def torch_bytes() -> dict[str, int]:
    """The allocator's peaks."""
    return {
        "allocated_peak": torch.cuda.max_memory_allocated(), "reserved_peak": torch.cuda.max_memory_reserved(),
        "num_retries": torch.cuda.memory_stats().get("num_alloc_retries", 0),
        "num_failures": torch.cuda.memory_stats().get("num_ooms", 0),
    }  # fmt: skip


def _watched(step: Any, peak: list[int]) -> Any:
    """A step that notes the most memory in use."""

    def watched() -> Any:
        report = step()
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            peak[0] = max(peak[0], total - free)
        return report

    return watched
