"""What the engine makes of its configuration before it touches the device: family, device, dtype, limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch

from executor_service.engine.limits import EngineLimits
from executor_service.engine.messages import EngineConfig
from registry import InputContext
from registry.errors import CheckpointError
from registry.families import open_family
from registry.family import ModelFamily

DTYPES: Final = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
MAX_NUM_SEQS: Final = {"cpu": 64, "cuda": 256}
MAX_NUM_BATCHED_TOKENS: Final = {"cpu": 2048, "cuda": 8192}
"""Where the configuration leaves the choice. A GPU multiplies thousands of rows at the speed of hundreds."""

_REMEDIES: Final = {"video": " or lower --max-video-frames", "audio": " or lower --max-audio-seconds"}
"""What else helps where an item is too long for a request."""


@dataclass(frozen=True)
class Setting:
    """Where and how the engine runs."""

    family: ModelFamily
    device: torch.device
    dtype: torch.dtype
    limits: EngineLimits
    runs_ahead: bool


def load_config(config: EngineConfig) -> Setting:
    """Errors say which limit to change, and to what."""
    family = open_family(config.model_dir, config.limits, config.plugins)
    device = pick_device(config.device)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    runs_ahead = device.type != "cpu" if config.async_scheduling == "auto" else config.async_scheduling == "on"
    dtype = _pick_dtype(config.dtype, family.ctx, device)
    return Setting(family, device, dtype, _limits(family, config, device), runs_ahead)


def pick_device(name: str) -> torch.device:
    """`auto`: a GPU that torch can use, else the CPU."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        build = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a build without CUDA"
        raise CheckpointError(
            f"--device {name}: torch sees no CUDA device; torch {torch.__version__} {build}; "
            "install a driver and torch's CUDA build, or use --device cpu"
        )
    return torch.device("cuda", torch.cuda.current_device())


def _pick_dtype(name: str, ctx: InputContext, device: torch.device) -> torch.dtype:
    """`auto`: float32 on CPU, where narrower types are emulated; the checkpoint's own elsewhere."""
    if name != "auto":
        if name not in DTYPES:
            raise CheckpointError(f"dtype {name!r} is not known; use one of auto, {', '.join(DTYPES)}")
        if device.type == "cuda" and name == "float64":
            raise CheckpointError(
                "dtype float64: the CUDA kernels take float32, float16 and bfloat16; use one of these"
            )
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    stored = getattr(ctx.model_config, "dtype", None) or torch.bfloat16
    return torch.bfloat16 if stored == torch.float64 else stored


def _limits(family: ModelFamily, config: EngineConfig, device: torch.device) -> EngineLimits:
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
    max_num_batched_tokens = config.max_num_batched_tokens or MAX_NUM_BATCHED_TOKENS[device.type]
    encoder = max([max_num_batched_tokens, *(features for features, _ in most.values())])
    max_num_seqs = config.max_num_seqs or MAX_NUM_SEQS[device.type]
    return EngineLimits(max_num_batched_tokens, max_num_seqs, encoder, max_model_len, config.block_size)


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
