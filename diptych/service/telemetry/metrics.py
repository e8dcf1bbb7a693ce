"""Every metric of both services: the one place where name, kind, unit, labels and buckets are said.

Names are OpenTelemetry's; Prometheus sees dots as underscores, with the unit and `_total` appended. Those that begin
with `gen_ai` are of the semantic conventions. docs/observability.md shows the table as Prometheus has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final


class Kind(Enum):
    """How a metric behaves; the values are Prometheus' types."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Metric:
    """One metric. `unit` as in UCUM: "s", "By", or "" for counts; `buckets` in that unit."""

    name: str
    kind: Kind
    unit: str
    labels: tuple[str, ...]
    description: str
    buckets: tuple[float, ...] = ()


_GEN_AI: Final = ("gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.request.model")
_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SHORT_SECONDS: Final = (0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0)
_POWERS: Final = tuple(float(2**n) for n in range(13))

# --- both services --------------------------------------------------------------------------------
REQUESTS: Final = Metric(
    "diptych.requests", Kind.COUNTER, "", ("method", "code"), "Requests that ended, by method and gRPC status"
)
STAGE_DURATION: Final = Metric(
    "diptych.stage.duration", Kind.HISTOGRAM, "s", ("stage",), "Time that one request (or one media item) spent in a "
    "stage", _SECONDS,
)  # fmt: skip
STAGE_FAILURES: Final = Metric(
    "diptych.stage.failures", Kind.COUNTER, "", ("stage", "code"), "Stages that failed, by gRPC status; stages fetch, "
    "probe, decode and map are about media",
)  # fmt: skip
PROMPT_TOKENS: Final = Metric(
    "diptych.prompt_tokens", Kind.COUNTER, "", (), "Tokens of the prompts of answers that were begun, media included"
)
OUTPUT_TOKENS: Final = Metric("diptych.output_tokens", Kind.COUNTER, "", (), "Tokens given as output")
PAYLOAD: Final = Metric(
    "diptych.payload", Kind.COUNTER, "By", ("kind",), "Bytes by kind: media (files in from clients), tensors_sent, "
    "tensors_received, tensors_held (not sent because the executor had them)",
)  # fmt: skip

# --- preprocess service ---------------------------------------------------------------------------
TIME_TO_FIRST_TOKEN: Final = Metric(
    "gen_ai.server.time_to_first_token", Kind.HISTOGRAM, "s", _GEN_AI, "From the request's arrival to its first token",
    (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
)  # fmt: skip
REQUEST_DURATION: Final = Metric(
    "gen_ai.server.request.duration", Kind.HISTOGRAM, "s", (*_GEN_AI, "error.type"), "From the request's arrival to "
    "its end; error.type is the gRPC status of those that failed, and empty else",
    (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92),
)  # fmt: skip
INTER_TOKEN_LATENCY: Final = Metric(
    "diptych.inter_token_latency", Kind.HISTOGRAM, "s", (), "Between two pieces of one answer, which have one token "
    "each unless the client or this service is behind", _SHORT_SECONDS,
)  # fmt: skip
PENDING: Final = Metric("diptych.requests.pending", Kind.GAUGE, "", (), "Requests that are worked on")
READY_EXECUTORS: Final = Metric("diptych.executors.ready", Kind.GAUGE, "", (), "Executors that take requests")

# --- executor service -----------------------------------------------------------------------------
ENGINE_REQUESTS: Final = Metric(
    "diptych.engine.requests", Kind.GAUGE, "", ("state",), "Live requests by state: receiving (tensors are arriving), "
    "waiting (for a place in the batch), running",
)  # fmt: skip
KV_USED_BLOCKS: Final = Metric("diptych.kv_cache.used_blocks", Kind.GAUGE, "", (), "KV cache blocks in use")
KV_BLOCKS: Final = Metric("diptych.kv_cache.blocks", Kind.GAUGE, "", (), "KV cache blocks there are")
PREFIX_HIT_TOKENS: Final = Metric(
    "diptych.prefix_cache.hit_tokens", Kind.COUNTER, "", (), "Prompt tokens that were found in the prefix cache"
)
ENCODED_ITEMS: Final = Metric("diptych.encoder.items", Kind.COUNTER, "", (), "Media items that the encoder ran on")
ENCODER_HITS: Final = Metric(
    "diptych.encoder_cache.hits", Kind.COUNTER, "", (), "Media items whose features were found in the encoder cache"
)
ITEMS: Final = Metric(
    "diptych.items", Kind.COUNTER, "", ("source",), "Media items of requests: received (their tensors were sent), held "
    "(they were here)",
)  # fmt: skip
MEDIA_MEMORY: Final = Metric(
    "diptych.media_memory.used", Kind.GAUGE, "By", (), "Shared memory for item tensors that live requests hold"
)
PREEMPTIONS: Final = Metric(
    "diptych.preemptions", Kind.COUNTER, "", (), "Requests that gave up their KV cache blocks and are computed again"
)
STEP_DURATION: Final = Metric(
    "diptych.engine.step.duration", Kind.HISTOGRAM, "s", (), "One engine step: schedule, execute, sample, update",
    _SECONDS,
)  # fmt: skip
BATCH_REQUESTS: Final = Metric(
    "diptych.engine.batch.requests", Kind.HISTOGRAM, "", (), "Requests in one engine step", _POWERS
)
BATCH_TOKENS: Final = Metric(
    "diptych.engine.batch.tokens", Kind.HISTOGRAM, "", (), "Tokens computed in one engine step", _POWERS
)

BOTH: Final = (REQUESTS, STAGE_DURATION, STAGE_FAILURES, PROMPT_TOKENS, OUTPUT_TOKENS, PAYLOAD)
PREPROCESS: Final = (*BOTH, TIME_TO_FIRST_TOKEN, REQUEST_DURATION, INTER_TOKEN_LATENCY, PENDING, READY_EXECUTORS)
EXECUTOR: Final = (
    *BOTH, ENGINE_REQUESTS, KV_USED_BLOCKS, KV_BLOCKS, PREFIX_HIT_TOKENS, ENCODED_ITEMS, ENCODER_HITS, ITEMS,
    MEDIA_MEMORY, PREEMPTIONS, STEP_DURATION, BATCH_REQUESTS, BATCH_TOKENS,
)  # fmt: skip
