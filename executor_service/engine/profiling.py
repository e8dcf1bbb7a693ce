"""`profile_run`: the registered dummy data through the real model, at the worst load that can be admitted."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from executor_service.engine.block_manager import BlockManager
from executor_service.engine.kv_cache import allocate_kv_caches
from executor_service.engine.logprobs import ROWS_AT_ONCE, token_logprobs
from executor_service.engine.memory import peak_resident_bytes, reset_peak, resident_bytes
from executor_service.engine.messages import SamplingParams
from executor_service.engine.model_runner import ModelRunner
from executor_service.engine.request import EngineItem, Request
from executor_service.engine.scheduler import ScheduledBatch, ScheduledRequest
from executor_service.models.protocol import KVGeometry
from registry import ItemLayout, MediaInfo, MediaItem, TensorSpec
from registry.family import ModelFamily


@dataclass(frozen=True)
class WorstLoad:
    """Limits of one step: tokens, requests and encoder features; `max_model_len` tokens per request."""

    max_num_batched_tokens: int
    max_num_seqs: int
    max_num_encoder_tokens: int
    max_model_len: int


@dataclass(frozen=True)
class MemoryPeaks:
    """Bytes used beyond what was there before."""

    vision: int
    language: int


@torch.inference_mode()
def profile_run(family: ModelFamily, runner: ModelRunner, geometry: KVGeometry, load: WorstLoad) -> MemoryPeaks:
    """Encoder at its largest batch, then the language model and the sampler at theirs, on a scratch KV cache."""
    prompt, items = _dummy_items(family, load)
    before = resident_bytes()
    reset_peak()
    runner.encode(_largest_encoder_batch(items, load.max_num_encoder_tokens))
    vision = max(peak_resident_bytes() - before, 0)
    reset_peak()
    _run_language_model(runner, geometry, load, prompt, items)
    return MemoryPeaks(vision, max(peak_resident_bytes() - before, 0))


def _dummy_items(family: ModelFamily, load: WorstLoad) -> tuple[list[int], list[EngineItem]]:
    """The expanded dummy prompt and its items, mapped as the preprocess service would; equal ones mapped once."""
    counts = {m: count for m in family.modalities if (count := family.ctx.limits.max_items(m))}
    inputs, media = family.dummy_data(min(load.max_num_batched_tokens, load.max_model_len), counts)
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


def _run_language_model(
    runner: ModelRunner, geometry: KVGeometry, load: WorstLoad, prompt: list[int], items: list[EngineItem]
) -> None:
    """Prompts of dummy data up to the token budget; then what follows the model, for as many rows as it may get."""
    length = min(load.max_model_len, load.max_num_batched_tokens)
    blocks = BlockManager(-(-load.max_num_batched_tokens // runner.block_size) + 1, runner.block_size)
    runner.kv_caches = allocate_kv_caches(geometry, blocks.num_blocks, runner)
    request = Request(0, prompt[:length], items, SamplingParams(max_tokens=1), len(prompt) + 1)
    inside = tuple(item for item in items if item.placeholder.offset < length)
    blocks.reserve(request, length)
    runner.execute(ScheduledBatch([ScheduledRequest(request, length, inside)]))
    runner.kv_caches = ()
    _run_sampler(runner, load.max_num_seqs)


def _run_sampler(runner: ModelRunner, max_num_seqs: int) -> None:
    """Logits and every part of the sampler for `max_num_seqs` rows, then a chunk of prompt log probabilities.

    The sampler's table of token counts has its final size afterwards.
    """
    params = SamplingParams(max_tokens=1, temperature=1.0, top_p=0.9, min_p=0.1, logprobs=20, repetition_penalty=2.0,
                            logit_bias=((0, 1.0),), bad_words=((0,),))  # fmt: skip
    requests = [Request(number, [0], [], params, 2) for number in range(max_num_seqs)]
    runner.sampler.sample(runner.model.compute_logits(_zeros(runner, max_num_seqs)), requests)
    for request in requests:
        runner.sampler.release(request.request_id)
    token_logprobs(runner.model.compute_logits(_zeros(runner, ROWS_AT_ONCE)), [0] * ROWS_AT_ONCE, [20] * ROWS_AT_ONCE)


def _zeros(runner: ModelRunner, num_rows: int) -> torch.Tensor:
    """Hidden states: [num_rows, width]."""
    width = runner.model.get_input_embeddings()(torch.zeros(1, dtype=torch.int64, device=runner.device)).shape[-1]
    return torch.zeros((num_rows, width), dtype=runner.dtype, device=runner.device)
