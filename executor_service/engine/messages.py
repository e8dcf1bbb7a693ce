"""What passes between the front and the engine process: plain data, no torch.

Front to engine: EngineConfig (once), Submit, or Announce and Complete, Abort, Shutdown. Engine to front: BootProgress,
then Booted or BootFailed, then each step's StepTokens, if it gave any, and its StepEnd; EngineFailed if it has to end.
What somebody waits for is small: code that has not run for some milliseconds takes 0.1 ms to write a request or a whole
report, and as much to read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

from registry import MediaInfo, MediaLimits
from registry.fingerprint import Fingerprint


@dataclass(frozen=True)
class EngineConfig:
    """Everything the engine is told at its start; None: the engine picks. `async_scheduling` auto, on or off.

    Memory in bytes, lengths and budgets in tokens. `check_integrity` proves the resources after every
    step and ends the engine if they are not whole (for tests). `began` is when whoever starts it began, on
    `time.monotonic()`, for the first line of the boot.
    """

    model_dir: Path
    plugins: tuple[str, ...] = ()
    limits: MediaLimits = field(default_factory=MediaLimits)
    device: str = "auto"
    dtype: str = "auto"
    decoder: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int = 16
    gpu_memory_utilization: float = 0.9
    kv_cache_memory: int | None = None
    num_threads: int | None = None
    prefix_caching: bool = True
    cuda_graphs: bool = True
    async_scheduling: str = "auto"
    encoder_cache_memory: int | None = None
    check_integrity: bool = False
    began: float | None = None


@dataclass(frozen=True)
class SamplingParams:
    """How output tokens are chosen; every value is set and checked by the front.

    `temperature` 0 is greedy; `top_k` 0 means all; `logprobs` and `prompt_logprobs` None mean none, 0 the chosen
    token's alone. `logit_bias` is (token id, bias) with each id once; `bad_words` are sequences of at least one id.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()

    @property
    def has_penalties(self) -> bool:
        """Whether any penalty changes anything."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True)
class TensorSlot:
    """One tensor in the shared arena: `arena_offset` and `num_bytes` say where."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    arena_offset: int
    num_bytes: int


@dataclass(frozen=True)
class ItemSlots:
    """One media item of a request: its range in the prompt, its header facts, its tensors.

    `content_digest` is SHA-256 over everything its features depend on: tensors and constants.
    """

    offset: int
    length: int
    info: MediaInfo
    tensors: tuple[TensorSlot, ...]
    content_digest: bytes


@dataclass(frozen=True)
class Submit:
    """A complete, admitted request. `request_id` is the front's number, unique while the front lives."""

    request_id: int
    prompt_token_ids: Sequence[int]
    items: tuple[ItemSlots, ...]
    sampling: SamplingParams
    priority: int = 0
    output_token_ids: Sequence[int] = ()


@dataclass(frozen=True)
class Announce:
    """A request whose tensors are still arriving: `submit` says all but where they are, and has no digests yet."""

    submit: Submit

    def completed(self, complete: Complete) -> Submit:
        """The request with its tensors."""
        contents = zip(self.submit.items, complete.offsets, complete.content_digests, strict=True)
        items = (
            replace(item, tensors=_placed(item.tensors, offsets), content_digest=digest)
            for item, offsets, digest in contents
        )
        return replace(self.submit, items=tuple(items))


@dataclass(frozen=True)
class Complete:
    """An announced request is complete: by item, its digest and where its tensors are in the arena, in their order."""

    request_id: int
    offsets: tuple[tuple[int, ...], ...]
    content_digests: tuple[bytes, ...]


def _placed(tensors: Sequence[TensorSlot], offsets: Sequence[int]) -> tuple[TensorSlot, ...]:
    return tuple(replace(slot, arena_offset=offset) for slot, offset in zip(tensors, offsets, strict=True))


@dataclass(frozen=True)
class Abort:
    """Requests to end before the next step; they are reported as finished with reason ABORTED.

    Those that are only announced are forgotten, and no more is said of them.
    """

    request_ids: tuple[int, ...]


@dataclass(frozen=True)
class Shutdown:
    """End the engine process."""


ToEngine = Submit | Announce | Complete | Abort | Shutdown


@dataclass(frozen=True)
class BootProgress:
    """A boot stage: `fraction` 0 to 1 while it runs; `seconds` and `num_bytes` once it is done."""

    stage: str
    fraction: float
    detail: str = ""
    seconds: float | None = None
    num_bytes: int | None = None


@dataclass(frozen=True)
class BootFailed:
    """The engine could not start; `message` is for the operator and says the remedy where there is one."""

    message: str


@dataclass(frozen=True)
class EngineFailed:
    """The last word of an engine that cannot go on; `message` is for the log and for whoever waits for an answer."""

    message: str


@dataclass(frozen=True)
class MemoryLedger:
    """Where the memory went at boot, in bytes; see the contract's message of the same name."""

    total_bytes: int
    gpu_memory_utilization: float
    weights_bytes: int
    vision_peak_bytes: int
    language_peak_bytes: int
    graphs_bytes: int
    other_bytes: int
    kv_cache_bytes: int
    block_size: int
    num_blocks: int
    block_bytes: int
    peaks_used_for_sizing: bool


@dataclass(frozen=True)
class Booted:
    """The engine is ready; what the front needs to know of it."""

    device: str
    dtype: str
    architecture: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    max_tokens_per_item: dict[str, int]
    fingerprint: Fingerprint
    ledger: MemoryLedger


class FinishReason(Enum):
    """Why a request left the engine; MISMATCHED: its items are not what the sender claimed."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"
    FAILED = "failed"
    MISMATCHED = "mismatched"


@dataclass(frozen=True)
class TokenLogprobs:
    """The chosen token's log probability and the likeliest (token id, log probability), likeliest first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Finished:
    """The end of one request; times in seconds, None where the stage did not happen.

    `arrived`, `encode_began` and `encode_ended` are on `time.monotonic()`, which the processes of a machine share;
    the encoder's are the host's, who does not wait for a GPU.
    """

    request_id: int
    reason: FinishReason
    num_cached_tokens: int = 0
    queue_seconds: float | None = None
    prefill_seconds: float | None = None
    generate_seconds: float | None = None
    error: str = ""
    arrived: float = 0.0
    encode_began: float | None = None
    encode_ended: float | None = None


@dataclass(frozen=True)
class Load:
    """The engine's load after a step; `num_preemptions` since its start."""

    num_running: int
    num_waiting: int
    num_used_blocks: int
    num_blocks: int
    num_preemptions: int = 0


@dataclass
class Counters:
    """What the engine has done since its boot.

    Tokens of prompts begun, and those of them found in the prefix cache; items encoded, and found in the encoder
    cache; requests preempted.
    """

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_encoded_items: int = 0
    num_encoder_cache_hits: int = 0
    num_preemptions: int = 0


@dataclass(frozen=True)
class StepTokens:
    """What a step gives to those who wait: `token_ids[i]` belongs to `request_ids[i]`, `logprobs` to indices of them.

    `prompt_logprobs` are (request id, of its next prompt tokens in order, from the second token on).
    """

    request_ids: list[int]
    token_ids: list[int]
    logprobs: list[tuple[int, TokenLogprobs]]
    prompt_logprobs: list[tuple[int, list[TokenLogprobs]]] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether nobody waits for any of it."""
        return not self.token_ids and not self.prompt_logprobs


@dataclass(frozen=True)
class StepEnd:
    """What else there is to say of a step, which gave `num_tokens` tokens.

    It took `seconds` and computed `num_scheduled_tokens` of `num_scheduled_requests`.
    """

    finished: list[Finished]
    load: Load
    counters: Counters
    num_tokens: int = 0
    seconds: float = 0.0
    num_scheduled_requests: int = 0
    num_scheduled_tokens: int = 0


@dataclass(frozen=True)
class StepReport:
    """All that a step says; it is sent in these two parts."""

    tokens: StepTokens
    end: StepEnd


FromEngine = BootProgress | BootFailed | Booted | StepTokens | StepEnd | EngineFailed
