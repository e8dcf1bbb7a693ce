"""What a client gets: plain dataclasses, made from the contract's messages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from diptych.v1 import executor_pb2, preprocess_pb2, tensor_pb2


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens a request used."""

    prompt_tokens: int
    image_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log probability of one token of output or prompt, and of the likeliest ones as (token id, log probability)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Final:
    """How an answer ended: "stop" or "length"; `stop`: the stop string that ended it; `times` in seconds by stage."""

    finish_reason: str
    usage: Usage
    stop: str | None
    times: dict[str, float]


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of answer `index`; its last has `final`, those before its first token `prompt_logprobs`, if asked for."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...]
    final: Final | None
    prompt_logprobs: tuple[Logprobs, ...] = ()
    index: int = 0


@dataclass(slots=True)
class Generation:
    """A whole answer. `logprobs` has one entry per token if they were asked for, else it is empty.

    `prompt_logprobs`, too: one per token of the expanded prompt from the second on.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    final: Final | None = None
    prompt_logprobs: list[Logprobs] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """Append one piece."""
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs
        self.prompt_logprobs += piece.prompt_logprobs
        self.final = piece.final or self.final


@dataclass(frozen=True, slots=True)
class TensorShape:
    """A tensor to come."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Item:
    """One media item of a plan; `digest` is None where only a header was given."""

    modality: str
    height: int | None
    width: int | None
    digest: bytes | None
    offset: int
    length: int
    num_feature_tokens: int
    tensors: tuple[TensorShape, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a request is made of."""

    prompt_token_ids: list[int]
    items: tuple[Item, ...]


@dataclass(slots=True)
class Processed:
    """A plan and the bytes of its tensors: `tensors[item][name]`, row-major and little-endian, as the plan says."""

    plan: Plan = field(default_factory=lambda: Plan([], ()))
    tensors: list[dict[str, bytearray]] = field(default_factory=list)

    def add(self, message: preprocess_pb2.ProcessResponse) -> None:
        """Take one message of the stream: first the plan, then pieces in order."""
        if message.HasField("plan"):
            self.plan = plan_from_proto(message.plan)
            self.tensors = [{tensor.name: bytearray() for tensor in item.tensors} for item in self.plan.items]
        else:
            chunk = message.chunk
            name = self.plan.items[chunk.item_index].tensors[chunk.tensor_index].name
            self.tensors[chunk.item_index][name] += chunk.data


@dataclass(frozen=True, slots=True)
class Model:
    """A model of a preprocess service; maps are by modality."""

    name: str
    architecture: str
    placeholders: dict[str, str]
    max_model_len: int
    max_items_per_prompt: dict[str, int]
    max_tokens_per_item: dict[str, int]
    fingerprint: bytes
    num_ready_executors: int


@dataclass(frozen=True, slots=True)
class MemoryLedger:
    """Where an executor's memory went at boot, in bytes."""

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


@dataclass(frozen=True, slots=True)
class ExecutorModel:
    """What an executor serves."""

    name: str
    architecture: str
    device: str
    dtype: str
    fingerprint: bytes
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_items_per_prompt: dict[str, int]
    max_tokens_per_item: dict[str, int]
    memory_ledger: MemoryLedger


def piece_from_proto(message: preprocess_pb2.GenerateResponse) -> Piece:
    """A piece from its message."""
    final = _final(message.final) if message.HasField("final") else None
    return Piece(
        message.text,
        tuple(message.token_ids),
        tuple(_logprobs(message.logprobs)),
        final,
        tuple(_logprobs(message.prompt_logprobs)),
        message.index,
    )


def plan_from_proto(message: preprocess_pb2.PlanResponse) -> Plan:
    """A plan from its message."""
    return Plan(list(message.prompt_token_ids), tuple(_item(item) for item in message.items))


def models_from_proto(message: preprocess_pb2.ListModelsResponse) -> list[Model]:
    """The models of a service."""
    return [
        Model(
            model.name,
            model.architecture,
            dict(model.placeholders),
            model.max_model_len,
            dict(model.max_items_per_prompt),
            dict(model.max_tokens_per_item),
            model.fingerprint,
            model.num_ready_executors,
        )
        for model in message.models
    ]


def executor_model_from_proto(message: executor_pb2.GetModelResponse) -> ExecutorModel:
    """What an executor says of itself."""
    ledger = message.memory_ledger
    limits = message.limits
    return ExecutorModel(
        name=message.name,
        architecture=message.architecture,
        device=message.device,
        dtype=_short(tensor_pb2.DType.Name(message.dtype), "D_TYPE_"),
        fingerprint=message.fingerprint.digest,
        max_model_len=limits.max_model_len,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_items_per_prompt=dict(limits.max_items_per_prompt),
        max_tokens_per_item=dict(limits.max_tokens_per_item),
        memory_ledger=MemoryLedger(*(getattr(ledger, name) for name in MemoryLedger.__dataclass_fields__)),
    )


def _final(message: preprocess_pb2.GenerateFinal) -> Final:
    usage = message.usage
    return Final(
        finish_reason=_short(tensor_pb2.FinishReason.Name(message.finish_reason), "FINISH_REASON_"),
        usage=Usage(usage.prompt_tokens, usage.image_tokens, usage.cached_tokens, usage.completion_tokens),
        stop=message.stop if message.HasField("stop") else None,
        times={field.name.removesuffix("_seconds"): value for field, value in message.times.ListFields()},
    )


def _logprobs(messages: Iterable[tensor_pb2.PositionLogprobs]) -> Iterable[Logprobs]:
    for message in messages:
        top = tuple((entry.token_id, entry.logprob) for entry in message.top)
        yield Logprobs(message.chosen.token_id, message.chosen.logprob, top)


def _item(message: preprocess_pb2.PlannedItem) -> Item:
    info = message.info
    return Item(
        modality=_short(tensor_pb2.Modality.Name(info.modality), "MODALITY_"),
        height=info.height if info.HasField("height") else None,
        width=info.width if info.HasField("width") else None,
        digest=message.media_digest if message.HasField("media_digest") else None,
        offset=message.placeholder.offset,
        length=message.placeholder.length,
        num_feature_tokens=message.num_feature_tokens,
        tensors=tuple(
            TensorShape(tensor.name, _short(tensor_pb2.DType.Name(tensor.dtype), "D_TYPE_"), tuple(tensor.shape))
            for tensor in message.tensors
        ),
    )


def _short(name: str, prefix: str) -> str:
    """`FINISH_REASON_STOP` -> `stop`."""
    return name.removeprefix(prefix).lower()
