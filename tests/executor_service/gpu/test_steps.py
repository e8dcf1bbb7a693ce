"""Steps on a GPU: one that only decodes is one replay of one graph, and no step waits for the device."""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from executor_service.engine.decode_graphs import graph_sizes, size_holding
from executor_service.engine.loop import EngineLoop
from executor_service.engine.messages import TensorSlot
from executor_service.engine.scheduler import ScheduledBatch
from tests.executor_service.conftest import Bench, picture
from tests.executor_service.gpu.booting import MAX_NUM_SEQS, boot_on_gpu
from tests.executor_service.test_engine_tokens import mixed_requests

pytestmark = pytest.mark.gpu

SIZES = sorted(graph_sizes(MAX_NUM_SEQS))
SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 1.1, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.2, "logprobs": 5},
    {"prompt_logprobs": 2, "logit_bias": ((5, 1.0), (9, -2.0)), "min_tokens": 3},
    {"temperature": 0.7, "min_p": 0.1, "bad_words": ((7, 8),), "presence_penalty": 0.5},
]
"""What a step may have to bring to the device for its rows, and to fetch of them."""


@dataclass
class Step:
    """Tokens of each request in a step, and what ran for it."""

    num_tokens: list[int]
    graphs: list[torch.cuda.CUDAGraph] = field(default_factory=list)
    num_forwards: int = 0

    @property
    def kind(self) -> str:
        if max(self.num_tokens) == 1:
            return "decode"
        return "mixed" if min(self.num_tokens) == 1 else "prefill"


def record(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Every step from here on; also the vision tower replays graphs."""
    runner, steps = bench.engine.runner, list[Step]()
    execute, forward, replay = runner.execute, runner.model.forward, torch.cuda.CUDAGraph.replay

    def executed(batch: ScheduledBatch) -> Any:
        steps.append(Step([scheduled.num_tokens for scheduled in batch.requests]))
        return execute(batch)

    def replayed(graph: torch.cuda.CUDAGraph) -> None:
        steps[-1].graphs.append(graph)
        replay(graph)

    def forwarded(*arguments: Any, **options: Any) -> Any:
        steps[-1].num_forwards += 1
        return forward(*arguments, **options)

    monkeypatch.setattr(runner, "execute", executed)
    monkeypatch.setattr(runner.model, "forward", forwarded)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", replayed)
    return steps


@pytest.mark.parametrize("decoder", ["fused", "stock"])
def test_decode_steps_are_replays(checkpoint: Path, decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is one replay of the smallest graph that holds it, and nothing else goes through the decoder for it."""
    bench = Bench(checkpoint, boot_on_gpu(checkpoint, decoder=decoder), None)
    assert bench.engine.runner.graphs is not None
    graphs = bench.engine.runner.graphs._graphs
    assert sorted(graphs) == SIZES
    steps = record(bench, monkeypatch)
    requests = mixed_requests(bench, 11)
    outputs = bench.run(requests)
    assert all(len(outputs[request.request_id]) == request.num_output_tokens > 0 for request in requests)
    used = set()
    for step in steps:
        if step.kind == "decode":
            size = size_holding(len(step.num_tokens), SIZES)
            assert size is not None
            assert [graph is graphs[size] for graph in step.graphs] == [True]
            assert step.num_forwards == 0
            used.add(size)
        else:
            assert not any(graph is other for graph in step.graphs for other in graphs.values())
            assert step.num_forwards == 1
    # The longest answer has 18 tokens, the first of them by its prompt's step; answers end one after the other.
    assert sum(step.kind == "decode" for step in steps) >= 15
    assert {2, 4, 8, 16} <= used


def test_without_graphs_the_decoder_runs(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: then the counts above are others."""
    bench = Bench(checkpoint, boot_on_gpu(checkpoint, decoder="fused", cuda_graphs=False), None)
    steps = record(bench, monkeypatch)
    bench.run(mixed_requests(bench, 5))
    assert any(step.kind == "decode" for step in steps)
    assert all(step.num_forwards == 1 and not step.graphs for step in steps)


# --- waiting --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"cuda_graphs": False}], ids=["graphs", "no graphs"])
def test_no_step_waits_for_the_device(
    checkpoint: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill, mixed and decode steps, with pictures and every kind of sampling.

    Tokens are waited for outside of `execute`, a step later. Inside, only the buffer of the step before the last is:
    it is written again when the device has read it.
    """
    bench = Bench(checkpoint, boot_on_gpu(checkpoint, decoder="fused", prefix_caching=False, **config), None)
    serve(bench)  # what is made at a first call
    steps, waited = record(bench, monkeypatch), forbid_waiting(bench, monkeypatch)
    outputs = serve(bench)
    assert {step.kind for step in steps} == {"prefill", "mixed", "decode"}
    assert [len(tokens) for tokens in outputs.values()] == [12] * len(SAMPLING)
    own = bench.engine.runner._stage._copied
    assert waited
    assert all(any(event is one for one in own) for event in waited)


def serve(bench: Bench) -> dict[int, list[int]]:
    """Two requests, which decode when two more come; tensors where the front has them, in page-locked memory."""
    requests = [
        bench.request(number, "Look: <image> so?" + " tail" * number, [picture(number)], **sampling)
        for number, sampling in enumerate(SAMPLING)
    ]
    for item in (item for request in requests for item in request.items):
        item.tensors = {name: tensor.pin_memory() for name, tensor in item.tensors.items()}
    outputs = bench.run(requests[:2], steps=4)
    for number, tokens in bench.run(requests[2:]).items():
        outputs[number] = outputs.get(number, []) + tokens
    return outputs


def forbid_waiting(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list[torch.cuda.Event]:
    """Steps that wait fail from here on; returns the events that they wait for, which torch does not see."""
    runner, waited = bench.engine.runner, list[torch.cuda.Event]()
    execute = runner.execute

    def executed(batch: ScheduledBatch) -> Any:
        with monkeypatch.context() as patched, no_implicit_waits():
            watch_events(patched, waited)
            watch_copies(patched)
            return execute(batch)

    monkeypatch.setattr(runner, "execute", executed)
    return waited


@contextmanager
def no_implicit_waits() -> Iterator[None]:
    """What makes the host wait raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's, that it may not see every wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def watch_events(patched: pytest.MonkeyPatch, waited: list[torch.cuda.Event]) -> None:
    """Waiting for events is noted, for the device forbidden: the debug mode sees neither."""
    synchronize = torch.cuda.Event.synchronize

    def wait(event: torch.cuda.Event) -> None:
        waited.append(event)
        synchronize(event)

    def fail(*_: object) -> None:
        raise AssertionError("a step waits for the device")

    patched.setattr(torch.cuda.Event, "synchronize", wait)
    patched.setattr(torch.cuda, "synchronize", fail)


def watch_copies(patched: pytest.MonkeyPatch) -> None:
    """Copies between host and device ask for no waiting, from or into memory where they are granted that."""
    copy, to = Tensor.copy_, Tensor.to

    def check(target: Tensor, source: Tensor, options: dict[str, Any]) -> None:
        if target.is_cuda != source.is_cuda:
            assert options.get("non_blocking") is True
            assert (source if target.is_cuda else target).is_pinned()

    def copied(target: Tensor, source: Tensor, *arguments: Any, **options: Any) -> Tensor:
        check(target, source, options)
        return copy(target, source, *arguments, **options)

    def moved(source: Tensor, *arguments: Any, **options: Any) -> Tensor:
        target = to(source, *arguments, **options)
        check(target, source, options)
        return target

    patched.setattr(Tensor, "copy_", copied)
    patched.setattr(Tensor, "to", moved)


@pytest.mark.parametrize("wait", ["item", "event", "device", "pageable"])
def test_a_step_that_waits_is_seen(checkpoint: Path, wait: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: each way to wait, in the middle of a step."""
    bench = Bench(checkpoint, boot_on_gpu(checkpoint, decoder="fused", cuda_graphs=False), None)
    forward, event = bench.engine.runner.model.forward, torch.cuda.Event()

    def forwarded(*arguments: Any, **options: Any) -> Tensor:
        hidden: Tensor = forward(*arguments, **options)
        event.record()
        match wait:
            case "item":
                hidden.max().item()
            case "event":
                event.synchronize()
            case "device":
                torch.cuda.synchronize()
            case "pageable":
                torch.zeros(8).to(hidden.device, non_blocking=True)
        return hidden

    monkeypatch.setattr(bench.engine.runner.model, "forward", forwarded)
    waited = forbid_waiting(bench, monkeypatch)
    request = bench.request(0, "so?", [])
    if wait == "event":
        bench.run([request], steps=1)
        assert any(one is event for one in waited)
    else:
        with pytest.raises((RuntimeError, AssertionError), match=r"synchroniz|waits for the device|is_pinned"):
            bench.run([request], steps=1)


def test_buffers_and_arena_are_page_locked(checkpoint: Path) -> None:
    """From other memory a copy is staged by the host, which waits for room there, whatever it has asked for."""
    booted = boot_on_gpu(checkpoint, cuda_graphs=False)
    stage = booted.engine.runner._stage
    assert stage._buffer.is_cuda
    assert all(buffer.is_pinned() for buffer in stage._pinned)
    here, there = Pipe()
    arena = memoryview(mmap.mmap(-1, 1 << 20))
    assert not torch.frombuffer(arena, dtype=torch.uint8).is_pinned()
    with here, there:
        loop = EngineLoop(here, arena, booted)
        tensor = loop._view(TensorSlot("pixel_values", "uint8", (3, 7, 5), arena_offset=4096, num_bytes=105))
        try:
            assert tensor.is_pinned()
        finally:
            torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr() - 4096)
