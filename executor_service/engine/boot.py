"""Boot: `load_config -> load_kernels -> load_model -> profile_run -> allocate_kv_cache -> capture_graphs`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from transformers import GenerationConfig

from executor_service.engine.block_manager import BlockManager
from executor_service.engine.core import Engine
from executor_service.engine.encoder_cache import EncoderCache
from executor_service.engine.kv_cache import (
    allocate_kv_caches,
    block_bytes,
    default_kv_cache_bytes,
    num_blocks_in,
)
from executor_service.engine.memory import host_bytes, parameter_bytes
from executor_service.engine.messages import Booted, BootProgress, EngineConfig, MemoryLedger
from executor_service.engine.model_runner import ModelRunner
from executor_service.engine.profiling import MemoryPeaks, WorstLoad, profile_run
from executor_service.engine.scheduler import Scheduler
from executor_service.models.loader import load_model
from executor_service.models.protocol import KVGeometry, kv_geometry
from registry import InputContext
from registry.errors import CheckpointError
from registry.families import open_family
from registry.family import ModelFamily
from registry.fingerprint import fingerprint

Report = Callable[[BootProgress], None]
DTYPES: Final = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}

DEFAULT_ENCODER_CACHE_BYTES: Final = 256 * 1024 * 1024

_REMEDIES: Final = {"video": " or lower --max-video-frames", "audio": " or lower --max-audio-seconds"}
"""What else helps where an item is too long for a request."""


@dataclass(frozen=True)
class BootedEngine:
    """The engine, the family that reads its items, and what the front is told."""

    engine: Engine
    family: ModelFamily
    report: Booted


def boot(config: EngineConfig, report: Report) -> BootedEngine:
    """Everything up to SERVING; errors say what is wrong and, where there is one, the remedy."""
    with _stage("load_config", report):
        family, load, device, dtype = _load_config(config)
    with _stage("load_kernels", report) as stage:
        stage.detail = _load_kernels(device)
    with _stage("load_model", report) as stage:
        runner = _load_model(family, config, device, dtype, report)
        stage.num_bytes = parameter_bytes(runner.model)
    with _stage("profile_run", report) as stage:
        geometry = kv_geometry(runner.model, family.ctx.text_config)
        peaks = profile_run(family, runner, geometry, load)
        stage.num_bytes = max(peaks.vision, peaks.language)
    with _stage("allocate_kv_cache", report) as stage:
        ledger = _allocate_kv_cache(config, runner, geometry, load, peaks)
        stage.num_bytes, stage.detail = ledger.kv_cache_bytes, f"{ledger.num_blocks} blocks of {ledger.block_size}"
    with _stage("capture_graphs", report) as stage:
        stage.detail = "none on this device"
    scheduler = Scheduler(
        BlockManager(ledger.num_blocks, config.block_size, config.prefix_caching),
        EncoderCache(_encoder_cache_capacity(config, family, runner, load)),
        load.max_num_seqs,
        load.max_num_batched_tokens,
        load.max_num_encoder_tokens,
    )
    engine = Engine(scheduler, runner, _eos_token_ids(family.ctx), config.check_integrity)
    return BootedEngine(engine, family, _booted(family, engine, load, ledger))


@dataclass
class _Stage:
    detail: str = ""
    num_bytes: int | None = None


@contextlib.contextmanager
def _stage(name: str, report: Report) -> Iterator[_Stage]:
    """Report the stage's begin and, with seconds and bytes, its end."""
    report(BootProgress(name, 0.0))
    stage, start = _Stage(), time.monotonic()
    yield stage
    report(BootProgress(name, 1.0, stage.detail, time.monotonic() - start, stage.num_bytes))


def _load_config(config: EngineConfig) -> tuple[ModelFamily, WorstLoad, torch.device, torch.dtype]:
    family = open_family(config.model_dir, config.limits, config.plugins)
    device = _pick_device(config.device)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    load = _worst_load(family, config)
    return family, load, device, _pick_dtype(config.dtype, family.ctx, device)


def _pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu":
        raise CheckpointError(f"device {name!r} is not supported yet; use --device cpu")
    return torch.device(name)


def _pick_dtype(name: str, ctx: InputContext, device: torch.device) -> torch.dtype:
    """`auto`: float32 on CPU, where narrower types are emulated; the checkpoint's own elsewhere."""
    if name != "auto":
        if name not in DTYPES:
            raise CheckpointError(f"dtype {name!r} is not known; use one of auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    return getattr(ctx.model_config, "dtype", None) or torch.bfloat16


def _worst_load(family: ModelFamily, config: EngineConfig) -> WorstLoad:
    longest = int(getattr(family.ctx.text_config, "max_position_embeddings", 4096))
    max_model_len = config.max_model_len or longest
    if max_model_len > longest:
        raise CheckpointError(f"--max-model-len {max_model_len} is longer than the model's {longest} positions")
    _check_rope(family.ctx.text_config, max_model_len, longest)
    most = _largest_items(family)
    for modality, (features, length) in most.items():
        if length >= max_model_len:
            raise CheckpointError(
                f"one {modality} may need {length} of the {max_model_len} tokens a request may have "
                f"({features} features); raise --max-model-len above {length}{_REMEDIES.get(modality, '')}"
            )
    encoder = max([config.max_num_batched_tokens, *(features for features, _ in most.values())])
    return WorstLoad(config.max_num_batched_tokens, config.max_num_seqs, encoder, max_model_len)


def _check_rope(text_config: Any, max_model_len: int, longest: int) -> None:
    """Some rotary embeddings pick their frequencies by a batch's longest request: nobody may depend on others."""
    rope = getattr(text_config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings")
    limits = {"dynamic": longest, "longrope": original or longest}
    limit = limits.get(rope.get("rope_type", "default"))
    if limit is not None and max_model_len > limit:
        raise CheckpointError(
            f"rope type {rope['rope_type']!r} turns every request of a batch by the longest one's length once that "
            f"exceeds {limit}, so answers would depend on each other; use --max-model-len {limit}"
        )


def _largest_items(family: ModelFamily) -> dict[str, tuple[int, int]]:
    """Modality -> (features, tokens) of its largest item."""
    most = {}
    for modality in family.modalities:
        features = length = family.max_tokens(modality)
        if family.has_layout(modality):
            info = family.find_largest(modality, "length")
            length = max(length, family.layout(info).length)
        most[modality] = (features, length)
    return most


def _load_kernels(device: torch.device) -> str:
    """On CPU the reference implementations come with the ops; importing them is all there is to do."""
    return f"reference implementations on {device.type}"


def _load_model(
    family: ModelFamily, config: EngineConfig, device: torch.device, dtype: torch.dtype, report: Report
) -> ModelRunner:
    shown = -1.0

    def progress(done: int, total: int) -> None:
        nonlocal shown
        fraction = done / max(total, 1)
        if fraction - shown >= 0.01 or done == total:
            shown = fraction
            report(BootProgress("load_model", min(fraction, 0.999), num_bytes=done))

    model = load_model(family, _keyword_names(family), device, dtype, progress)
    if config.decoder != "stock":
        _fuse_decoder(model, is_required=config.decoder == "fused")
    return ModelRunner(model, device, dtype, config.block_size, _eos_token_ids(family.ctx))


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
    config: EngineConfig, runner: ModelRunner, geometry: KVGeometry, load: WorstLoad, peaks: MemoryPeaks
) -> MemoryLedger:
    """A byte budget on CPU; the ledger reports the peaks but does not size by them there."""
    bytes_per_block = block_bytes(geometry, config.block_size, runner.dtype)
    budget = config.kv_cache_memory
    if budget is None:
        budget = default_kv_cache_bytes(load.max_num_seqs, load.max_model_len, config.block_size, bytes_per_block)
    num_blocks = num_blocks_in(budget, bytes_per_block, config.block_size, load.max_model_len)
    runner.kv_caches = allocate_kv_caches(geometry, num_blocks, runner)
    return MemoryLedger(
        total_bytes=host_bytes(),
        gpu_memory_utilization=config.gpu_memory_utilization,
        weights_bytes=parameter_bytes(runner.model),
        vision_peak_bytes=peaks.vision,
        language_peak_bytes=peaks.language,
        graphs_bytes=0,
        other_bytes=0,
        kv_cache_bytes=num_blocks * bytes_per_block,
        block_size=config.block_size,
        num_blocks=num_blocks,
        block_bytes=bytes_per_block,
        peaks_used_for_sizing=False,
    )


def _encoder_cache_capacity(config: EngineConfig, family: ModelFamily, runner: ModelRunner, load: WorstLoad) -> int:
    """Feature tokens that fit the budget; it must hold the largest item, and by default what one step may encode."""
    bytes_per_feature = runner.feature_width * runner.dtype.itemsize
    if config.encoder_cache_memory is None:
        return max(DEFAULT_ENCODER_CACHE_BYTES // bytes_per_feature, load.max_num_encoder_tokens)
    capacity = config.encoder_cache_memory // bytes_per_feature
    largest = max((family.max_tokens(modality) for modality in family.modalities), default=0)
    if capacity < largest:
        raise CheckpointError(
            f"--encoder-cache-memory {config.encoder_cache_memory} holds {capacity} features, the largest item has "
            f"{largest}; raise it to {largest * bytes_per_feature}"
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


def _booted(family: ModelFamily, engine: Engine, load: WorstLoad, ledger: MemoryLedger) -> Booted:
    return Booted(
        device=str(engine.runner.device),
        dtype=str(engine.runner.dtype).removeprefix("torch."),
        architecture=family.ctx.architecture,
        max_model_len=load.max_model_len,
        vocab_size=family.ctx.vocab_size,
        eos_token_ids=engine.eos_token_ids,
        max_tokens_per_item={modality: family.max_tokens(modality) for modality in family.modalities},
        fingerprint=fingerprint(family),
        ledger=ledger,
    )
