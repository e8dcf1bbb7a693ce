"""`profile_run`: the registered dummy data through the real model, at the worst load that can be admitted."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from executor_service.engine.block_manager import BlockManager
from executor_service.engine.item_encoder import num_tensor_elements
from executor_service.engine.kv_cache import allocate_kv_caches
from executor_service.engine.logprobs import ROWS_AT_ONCE, PendingLogprobs
from executor_service.engine.memory import DeviceMemory, Memory
from executor_service.engine.messages import SamplingParams
from executor_service.engine.model_runner import ModelRunner
from executor_service.engine.request import EngineItem, Request
from executor_service.engine.scheduler import ScheduledBatch, ScheduledRequest
from executor_service.models.protocol import KVGeometry
from registry import ItemLayout, MediaInfo, MediaItem, TensorSpec
from registry.family import ModelFamily


@dataclass(frozen=True)
class MemoryPeaks:
    """Bytes used beyond what was there before: by a step's parts, and for good by graphs of `num_graphs` sizes.

    `reserved` is all that torch's allocator had at the larger of both peaks, weights included and the scratch KV cache
    not; 0 on CPU.
    """

    vision: int
    language: int
    graphs: int
    reserved: int


@torch.inference_mode()
def profile_run(
    family: ModelFamily, runner: ModelRunner, geometry: KVGeometry, memory: Memory, num_graphs: int
) -> MemoryPeaks:
    """Encoder at its largest batch of each modality, then language model and sampler at theirs, on a scratch KV cache.

    Then, if there are to be graphs, the largest of them.
    """
    prompt, items = _dummy_items(family, runner)
    if num_graphs and items:
        runner.encoder.capture(items[0])
    memory.begin()
    for modality in dict.fromkeys(item.modality for item in items):
        own = [item for item in items if item.modality == modality]
        largest = _largest_encoder_batch(own, runner.limits.max_num_encoder_tokens)
        runner.encoder.encode(largest)
        runner.encoder.max_run_elements[modality] = sum(map(num_tensor_elements, largest))
    vision, reserved = memory.peak_bytes(), memory.reserved_peak_bytes()
    memory.restart()
    runner.kv_caches = allocate_kv_caches(geometry, _num_scratch_blocks(runner), runner)
    scratch = sum(cache.keys.nbytes + cache.values.nbytes for cache in runner.kv_caches)
    _run_language_model(runner, prompt, items)
    _run_sampler(runner)
    language = max(memory.peak_bytes() - scratch, 0)
    reserved = max(reserved, memory.reserved_peak_bytes() - scratch)
    graphs = _graph_bytes(runner, memory, num_graphs)
    runner.kv_caches = ()
    return MemoryPeaks(vision, language, graphs, reserved)


def _dummy_items(family: ModelFamily, runner: ModelRunner) -> tuple[list[int], list[EngineItem]]:
    """The expanded dummy prompt and its items, mapped as the preprocess service would; equal ones mapped once."""
    counts = {m: count for m in family.modalities if (count := family.ctx.limits.max_items(m))}
    inputs, media = family.dummy_data(_longest_chunk(runner), counts)
    mapped: dict[MediaInfo, dict[str, torch.Tensor]] = {}
    items = []
    for item, placeholder in zip(media, inputs.placeholders, strict=True):
        if item.info not in mapped:
            arrays = family.map_item(item)
            mapped[item.info] = {name: torch.from_numpy(array) for name, array in arrays.items()}
        tensors = mapped[item.info]
        layout = _layout_of(family, item, inputs.prompt_token_ids[placeholder.offset : placeholder.end], tensors)
        items.append(EngineItem(placeholder, item.modality, layout, tensors))
    return inputs.prompt_token_ids, items


def _layout_of(
    family: ModelFamily, item: MediaItem, token_ids: list[int], tensors: dict[str, torch.Tensor]
) -> ItemLayout:
    """The family's, or where it has none what its processor and mapper made."""
    if family.has_layout(item.modality):
        return family.layout(item.info)
    specs = {name: TensorSpec(str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    return family.observed_layout(item.modality, token_ids, specs)


def _largest_encoder_batch(items: list[EngineItem], max_num_encoder_tokens: int) -> list[EngineItem]:
    """The dummy items over and over, as many as one step may encode."""
    batch: list[EngineItem] = []
    left = max_num_encoder_tokens
    while items:
        item = items[len(batch) % len(items)]
        if batch and item.layout.num_tokens > left:
            break
        left -= max(item.layout.num_tokens, 1)
        batch.append(EngineItem(item.placeholder, item.modality, item.layout, item.tensors))
    return batch


def _longest_chunk(runner: ModelRunner) -> int:
    """Tokens of one request that one step may compute."""
    return min(runner.limits.max_num_batched_tokens, runner.limits.max_model_len)


def _num_scratch_blocks(runner: ModelRunner) -> int:
    """For as many requests as fill a step."""
    limits, length = runner.limits, _longest_chunk(runner)
    return -(-limits.max_num_batched_tokens // length) * (-(-length // limits.block_size) + 1)


def _run_language_model(runner: ModelRunner, prompt: list[int], items: list[EngineItem]) -> None:
    """Prompts of dummy data up to the token budget, the first with its items."""
    limits, length = runner.limits, _longest_chunk(runner)
    blocks = BlockManager(_num_scratch_blocks(runner), limits.block_size, shares_prefixes=False)
    spans = runner.bidirectional_spans(items)
    inside = tuple(item for item in items if item.placeholder.offset < length)
    batch, left = list[ScheduledRequest](), limits.max_num_batched_tokens
    while left and len(batch) < limits.max_num_seqs:
        num_tokens = min(length, left)
        text = [0] * num_tokens if batch else prompt[:num_tokens]
        request = Request(
            len(batch), text, [] if batch else items, SamplingParams(max_tokens=1, temperature=0.0), len(prompt) + 1
        )
        request.spans = [span for span in spans if span[1] <= num_tokens and not batch]
        blocks.reserve(request, num_tokens)
        batch.append(ScheduledRequest(request, num_tokens, () if batch else inside))
        left -= num_tokens
    output = runner.execute(ScheduledBatch(sorted(batch, key=lambda scheduled: scheduled.num_tokens > 1)))
    output.sampled.result()
    for scheduled in batch:
        runner.sampler.release(scheduled.request.request_id)


def _run_sampler(runner: ModelRunner) -> None:
    """Logits and every part of the sampler for as many rows as it may get, then a chunk of prompt log probabilities."""
    params = SamplingParams(max_tokens=1, temperature=1.0, top_p=0.9, min_p=0.1, logprobs=20, repetition_penalty=2.0,
                            logit_bias=((0, 1.0),), bad_words=((0,),))  # fmt: skip
    num_rows = runner.limits.max_num_seqs
    requests = [Request(number, [0], [], params, 2) for number in range(num_rows)]
    runner.sampler.sample(runner.model.compute_logits(runner.zeros(num_rows)), requests).result()
    for request in requests:
        runner.sampler.release(request.request_id)
    logits = runner.model.compute_logits(runner.zeros(ROWS_AT_ONCE))
    PendingLogprobs(logits, [0] * ROWS_AT_ONCE, [20] * ROWS_AT_ONCE)


def _graph_bytes(runner: ModelRunner, memory: Memory, num_graphs: int) -> int:
    """What graphs take: the pool that the largest needs and all share, and what the driver keeps of each."""
    if not num_graphs:
        return 0
    assert isinstance(memory, DeviceMemory)
    torch.cuda.empty_cache()
    before, beside_torch = memory.own_bytes, memory.own_bytes_beside_torch
    graphs = runner.capture_graphs([runner.limits.max_num_seqs], lambda done, total: None)
    torch.cuda.empty_cache()
    of_each = max(memory.own_bytes_beside_torch - beside_torch, 0)
    taken = max(memory.own_bytes - before, 0) + (num_graphs - 1) * of_each
    del graphs
    torch.cuda.empty_cache()
    return taken
