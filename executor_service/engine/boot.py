"""Boot: `load_config -> load_kernels -> load_model -> profile_run -> allocate_kv_cache -> capture_graphs`.

Importing this takes seconds, and half of the boot's work needs nothing of it: see `engine.process`.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Final

import torch
from transformers import GenerationConfig

from executor_service.engine.block_manager import BlockManager
from executor_service.engine.configuration import Setting, load_config
from executor_service.engine.core import Engine
from executor_service.engine.decode_graphs import graph_sizes
from executor_service.engine.encoder_cache import EncoderCache
from executor_service.engine.kv_cache import (
    allocate_kv_caches,
    block_bytes,
    default_kv_cache_bytes,
    device_bytes_beside,
    device_kv_cache_bytes,
    num_blocks_in,
)
from executor_service.engine.memory import DeviceMemory, Memory, memory_of, parameter_bytes
from executor_service.engine.messages import Booted, EngineConfig, MemoryLedger
from executor_service.engine.model_runner import ModelRunner
from executor_service.engine.profiling import MemoryPeaks, profile_run
from executor_service.engine.scheduler import Scheduler
from executor_service.engine.stages import Report, Stages
from executor_service.imports import without_compiler
from executor_service.models.loader import load_model
from executor_service.models.protocol import KVGeometry, kv_geometry
from executor_service.models.weights import Progress, WeightReader
from registry import InputContext
from registry.errors import CheckpointError
from registry.family import ModelFamily
from registry.fingerprint import fingerprint

ENCODER_CACHE_STEPS: Final = 2
"""What one step encodes is pinned while the next encodes as much."""
MIN_ENCODER_CACHE_BYTES: Final = {"cpu": 256 * 1024 * 1024, "cuda": 0}
"""Where nothing is sized by it, more is kept for items that come again."""


@dataclass(frozen=True)
class BootedEngine:
    """The engine, the family that reads its items, and what the front is told."""

    engine: Engine
    family: ModelFamily
    report: Booted


def boot(
    config: EngineConfig, report: Report, since: float | None = None, reader: WeightReader | None = None
) -> BootedEngine:
    """Everything up to SERVING; errors say what is wrong and, where there is one, the remedy.

    `since` is when the stage before it ended, on `time.monotonic()`; `reader` has begun with the weights already.
    """
    stages = Stages(report, since)
    with stages.stage("load_config"):
        setting = load_config(config)
        family, limits = setting.family, setting.limits
        memory = memory_of(setting.device)
    with stages.stage("load_kernels") as stage:
        stage.detail = _load_kernels(setting.device, stages.progress("load_kernels"))
    with stages.stage("load_model") as stage, without_compiler():
        runner = _load_model(config, setting, stages.progress("load_model"), reader)
        stage.num_bytes = parameter_bytes(runner.model)
    with stages.stage("profile_run") as stage:
        geometry = kv_geometry(runner.model, family.ctx.text_config)
        sizes = graph_sizes(limits.max_num_seqs) if config.cuda_graphs and runner.can_capture else []
        peaks = profile_run(family, runner, geometry, memory, len(sizes))
        stage.num_bytes = max(peaks.vision, peaks.language)
    with stages.stage("allocate_kv_cache") as stage:
        ledger = _allocate_kv_cache(config, runner, geometry, peaks, memory)
        stage.num_bytes, stage.detail = ledger.kv_cache_bytes, f"{ledger.num_blocks} blocks of {ledger.block_size}"
    with stages.stage("capture_graphs") as stage:
        stage.detail = _capture_graphs(runner, sizes, stages.progress("capture_graphs"))
        stage.num_bytes = ledger.graphs_bytes or None
    scheduler = Scheduler(
        BlockManager(ledger.num_blocks, config.block_size, config.prefix_caching),
        EncoderCache(_encoder_cache_capacity(config, family, runner)),
        limits.max_num_seqs,
        limits.max_num_batched_tokens,
        limits.max_num_encoder_tokens,
    )
    engine = Engine(scheduler, runner, _eos_token_ids(family.ctx), config.check_integrity, setting.runs_ahead)
    return BootedEngine(engine, family, _booted(family, engine, ledger))


def _load_kernels(device: torch.device, progress: Progress) -> str:
    """On CPU the reference implementations come with the ops; importing them is all there is to do."""
    if device.type == "cpu":
        return "reference implementations on cpu"
    from executor_service.kernels.cuda.module import load_all

    torch.backends.cudnn.allow_tf32 = False  # a float32 model is one
    origins = load_all(progress)
    return f"{torch.cuda.get_device_name(device)}: {origins}"


def _load_model(config: EngineConfig, setting: Setting, progress: Progress, reader: WeightReader | None) -> ModelRunner:
    family, device, dtype = setting.family, setting.device, setting.dtype
    model = load_model(family, _keyword_names(family), device, dtype, progress, reader)
    if config.decoder != "stock":
        _fuse_decoder(model, is_required=config.decoder == "fused")
    return ModelRunner(model, device, dtype, setting.limits, _eos_token_ids(family.ctx))


def _capture_graphs(runner: ModelRunner, sizes: list[int], progress: Progress) -> str:
    if not sizes:
        return "none"
    runner.graphs = runner.capture_graphs(sizes, progress)
    return f"{len(sizes)} batch sizes up to {sizes[0]}"


def _fuse_decoder(model: Any, is_required: bool) -> None:
    is_fused = hasattr(model, "fuse_decoder") and model.fuse_decoder()
    if is_required and not is_fused:
        raise CheckpointError(
            f"--decoder fused: {type(model).__name__} has no decoder of a shape that the fused path knows; "
            "use --decoder auto"
        )


def _keyword_names(family: ModelFamily) -> tuple[str, ...]:
    """Every tensor and constant that a layout of the family names."""
    layouts = [
        family.layout(family.find_largest(modality, "num_tokens"))
        for modality in family.modalities
        if family.has_layout(modality)
    ]
    return tuple(dict.fromkeys(name for layout in layouts for name in (*layout.tensors, *layout.constants)))


def _allocate_kv_cache(
    config: EngineConfig, runner: ModelRunner, geometry: KVGeometry, peaks: MemoryPeaks, memory: Memory
) -> MemoryLedger:
    """What the GPU's share has left beside weights and peaks; on CPU a byte budget, and the ledger only reports."""
    limits, bytes_per_block = runner.limits, block_bytes(geometry, runner.limits.block_size, runner.dtype)
    budget, weights = config.kv_cache_memory, parameter_bytes(runner.model)
    flag = f"raise --kv-cache-memory to {limits.max_num_blocks_per_request * bytes_per_block}"
    if isinstance(memory, DeviceMemory):
        other = device_bytes_beside(memory, _encoder_cache_bytes(config, runner))
        if budget is None:
            budget = device_kv_cache_bytes(memory, config.gpu_memory_utilization, peaks, other)
            flag = "raise --gpu-memory-utilization"
    else:
        other = max(memory.own_bytes - weights, 0)
        budget = default_kv_cache_bytes(limits, bytes_per_block) if budget is None else budget
    num_blocks = num_blocks_in(budget, bytes_per_block, limits, flag)
    runner.kv_caches = allocate_kv_caches(geometry, num_blocks, runner)
    return MemoryLedger(
        total_bytes=memory.total_bytes,
        gpu_memory_utilization=config.gpu_memory_utilization,
        weights_bytes=weights,
        vision_peak_bytes=peaks.vision,
        language_peak_bytes=peaks.language,
        graphs_bytes=peaks.graphs,
        other_bytes=other,
        kv_cache_bytes=num_blocks * bytes_per_block,
        block_size=limits.block_size,
        num_blocks=num_blocks,
        block_bytes=bytes_per_block,
        peaks_used_for_sizing=isinstance(memory, DeviceMemory),
    )


def _encoder_cache_bytes(config: EngineConfig, runner: ModelRunner) -> int:
    """Budget of the features that are kept."""
    if config.encoder_cache_memory is not None:
        return config.encoder_cache_memory
    of_a_step = runner.limits.max_num_encoder_tokens * runner.encoder.feature_width * runner.dtype.itemsize
    return max(MIN_ENCODER_CACHE_BYTES[runner.device.type], ENCODER_CACHE_STEPS * of_a_step)


def _encoder_cache_capacity(config: EngineConfig, family: ModelFamily, runner: ModelRunner) -> int:
    """Feature tokens that fit the budget; it must hold the largest item, and by default what two steps may encode."""
    bytes_per_feature = runner.encoder.feature_width * runner.dtype.itemsize
    budget = _encoder_cache_bytes(config, runner)
    capacity = budget // bytes_per_feature
    largest = max((family.max_tokens(modality) for modality in family.modalities), default=0)
    if capacity < largest:
        raise CheckpointError(
            f"--encoder-cache-memory {budget} holds {capacity} features, the largest item has {largest}; "
            f"raise it to {largest * bytes_per_feature}"
        )
    return capacity


def _eos_token_ids(ctx: InputContext) -> frozenset[int]:
    """From generation_config.json, else the configuration, else the tokenizer: as transformers' generate."""
    sources = [getattr(ctx.model_config, "eos_token_id", None), getattr(ctx.text_config, "eos_token_id", None)]
    with contextlib.suppress(OSError):
        sources.insert(0, GenerationConfig.from_pretrained(ctx.model_dir, local_files_only=True).eos_token_id)
    sources.append(ctx.tokenizer.eos_token_id)
    found = next((ids for ids in sources if ids is not None), None)
    if found is None:
        return frozenset()
    return frozenset(found) if isinstance(found, list | tuple) else frozenset((found,))


def _booted(family: ModelFamily, engine: Engine, ledger: MemoryLedger) -> Booted:
    return Booted(
        device=str(engine.runner.device),
        dtype=str(engine.runner.dtype).removeprefix("torch."),
        architecture=family.ctx.architecture,
        max_model_len=engine.runner.limits.max_model_len,
        max_num_seqs=engine.runner.limits.max_num_seqs,
        max_num_batched_tokens=engine.runner.limits.max_num_batched_tokens,
        vocab_size=family.ctx.vocab_size,
        eos_token_ids=engine.eos_token_ids,
        max_tokens_per_item={modality: family.max_tokens(modality) for modality in family.modalities},
        fingerprint=fingerprint(family),
        ledger=ledger,
    )
