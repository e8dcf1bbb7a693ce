"""The boot profile on a GPU: a ledger that adds up, shares that are kept, and no allocation that fails later."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from executor_service.engine.boot import BootedEngine
from executor_service.engine.kv_cache import GpuShareTakenError, KVCacheTooSmallError
from executor_service.engine.memory import DeviceMemory
from executor_service.engine.messages import MemoryLedger
from executor_service.engine.request import Request
from registry import MediaLimits
from tests.executor_service.conftest import Bench, picture
from tests.executor_service.gpu.booting import boot_on_gpu

pytestmark = pytest.mark.gpu

SHARE = 0.1
SHARE_BYTES, ERROR = 15e9, 0.02
"""A share whose hundredths are more than a small model's allocator leaves of its slack, and less than a context."""
MAX_MODEL_LEN, MAX_NUM_SEQS, BUDGET = 512, 16, 1024
# A share of a GPU has room for millions of blocks of so small a model: fewer of larger ones, and no proof every step.
BLOCKS = {"block_size": 64, "check_integrity": False}


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """What earlier engines have left does not count."""
    gc.collect()
    torch.cuda.empty_cache()
    yield
    gc.collect()
    torch.cuda.empty_cache()


def boot_by_share(checkpoint: Path, share: float = SHARE, **config: object) -> BootedEngine:
    settings = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": MAX_NUM_SEQS, "max_num_batched_tokens": BUDGET,
                **BLOCKS}  # fmt: skip
    return boot_on_gpu(
        checkpoint, kv_cache_memory=None, gpu_memory_utilization=share, dtype="bfloat16", **{**settings, **config}
    )


def test_the_ledger_adds_up(checkpoint: Path) -> None:
    booted = boot_by_share(checkpoint)
    ledger = booted.report.ledger
    share = ledger.total_bytes * ledger.gpu_memory_utilization
    assert ledger.total_bytes == torch.cuda.mem_get_info()[1]
    assert ledger.peaks_used_for_sizing
    assert ledger.kv_cache_bytes == ledger.num_blocks * ledger.block_bytes
    caches = booted.engine.runner.kv_caches
    assert ledger.kv_cache_bytes == sum(cache.keys.nbytes + cache.values.nbytes for cache in caches)
    weights = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in booted.engine.runner.model.parameters()
    }
    assert ledger.weights_bytes >= sum(weights.values()) > 0
    assert min(ledger.vision_peak_bytes, ledger.language_peak_bytes, ledger.graphs_bytes, ledger.other_bytes) > 0
    assert 0.9 * share <= predicted_bytes(ledger) <= 1.01 * share


def predicted_bytes(ledger: MemoryLedger) -> int:
    """Everything in the ledger; of the two peaks the larger, since they are not at the same time."""
    peak = max(ledger.vision_peak_bytes, ledger.language_peak_bytes)
    return ledger.weights_bytes + peak + ledger.graphs_bytes + ledger.other_bytes + ledger.kv_cache_bytes


def test_half_the_share_has_fewer_blocks(checkpoint: Path) -> None:
    blocks = []
    for share in (SHARE, SHARE / 2):
        booted = boot_by_share(checkpoint, share)
        ledger = booted.report.ledger
        blocks.append(ledger.num_blocks * ledger.block_bytes)
        total = ledger.total_bytes
        del booted
        gc.collect()
        torch.cuda.empty_cache()
    assert blocks[0] - blocks[1] == pytest.approx(total * SHARE / 2, rel=0.05)


def test_without_graphs_there_is_none_in_the_ledger(checkpoint: Path) -> None:
    assert boot_by_share(checkpoint, cuda_graphs=False).report.ledger.graphs_bytes == 0


def test_too_small_a_share_says_what_to_do(checkpoint: Path) -> None:
    with pytest.raises(KVCacheTooSmallError, match=r"room for 0 blocks .* raise --gpu-memory-utilization"):
        boot_by_share(checkpoint, 0.001)


def test_a_share_that_somebody_else_has(checkpoint: Path) -> None:
    """This process's own memory counts as its own; so the share is taken by asking for more than there is."""
    free, total = torch.cuda.mem_get_info()
    hog = torch.empty(int(free - 0.3 * total), dtype=torch.uint8, device="cuda")
    try:
        with pytest.raises((GpuShareTakenError, KVCacheTooSmallError)) as caught:
            boot_by_share(checkpoint, 0.6)
        assert "--gpu-memory-utilization" in str(caught.value)
    finally:
        del hog


@pytest.mark.parametrize("decoder", ["fused", "stock"])
def test_the_worst_load_allocates_nothing_more(checkpoint: Path, decoder: str) -> None:
    """Every request with as many pictures as are allowed and at full length in the end, twice over."""
    booted = boot_by_share(checkpoint, decoder=decoder, limits=MediaLimits({"image": 4}))
    bench = Bench(checkpoint, booted, None)
    ledger = booted.report.ledger
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    failures = torch.cuda.memory_stats()["num_ooms"], torch.cuda.memory_stats()["num_alloc_retries"]
    requests = full_requests(bench)
    for request in requests:
        bench.engine.add(request)
    while bench.engine.has_work:
        bench.engine.step()
    assert all(request.num_tokens == MAX_MODEL_LEN for request in requests)
    assert (torch.cuda.memory_stats()["num_ooms"], torch.cuda.memory_stats()["num_alloc_retries"]) == failures
    allowed = ledger.total_bytes * ledger.gpu_memory_utilization
    assert torch.cuda.max_memory_allocated() < allowed
    assert bench.engine.load.num_used_blocks == 0


def test_the_driver_says_what_the_ledger_does(checkpoint: Path) -> None:
    """After the boot, and at the worst load within two hundredths of all that the ledger has predicted.

    What other processes have, and what other tests have left in this one, is no part of it.
    """
    memory = DeviceMemory(torch.device("cuda", torch.cuda.current_device()))
    before = driver_bytes() - memory.own_bytes + torch.cuda.memory_reserved()
    booted = boot_by_share(checkpoint, min(SHARE_BYTES / memory.total_bytes, 0.9), limits=MediaLimits({"image": 4}))
    bench = Bench(checkpoint, booted, None)
    predicted = predicted_bytes(booted.report.ledger)
    peak = driver_bytes() - before
    assert peak <= (1 + ERROR) * predicted
    requests = full_requests(bench)
    for request in requests:
        bench.engine.add(request)
    while bench.engine.has_work:
        bench.engine.step()
        peak = max(peak, driver_bytes() - before)
    assert all(request.num_tokens == MAX_MODEL_LEN for request in requests)
    print(f"the driver says {peak / 1e9:.3f} GB, the ledger {predicted / 1e9:.3f} GB: {peak / predicted - 1:+.2%}")
    assert peak == pytest.approx(predicted, rel=ERROR)


def driver_bytes() -> int:
    """In use on the GPU, by all processes."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def full_requests(bench: Bench) -> list[Request]:
    """Twice as many as may run; prompts of different length that all end at the longest a request may be."""
    requests = []
    for number in range(2 * MAX_NUM_SEQS):
        pictures = [picture(4 * number + index, 300, 200) for index in range(4)]
        text = "<image>" * 4 + " long" * (40 + number)
        request = bench.request(number, text, pictures, max_tokens=MAX_MODEL_LEN, logprobs=5)
        assert request.num_prompt_tokens < MAX_MODEL_LEN
        requests.append(request)
    return requests
