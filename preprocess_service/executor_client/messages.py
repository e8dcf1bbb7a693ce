"""A plan as the Start message of a request."""

from __future__ import annotations

from diptych.service.telemetry.propagation import TRACEPARENT, TRACESTATE, to_headers
from diptych.v1 import executor_pb2, tensor_pb2
from diptych.wire.bounds import check_readable
from diptych.wire.dtypes import DTYPE_OF_NAME
from diptych.wire.media import media_info_to_proto, placeholder_to_proto
from preprocess_service.requests import GenerateCall, Plan, PlannedItem
from registry import TensorSpec


def make_start(call: GenerateCall, plan: Plan, fingerprint_digest: bytes) -> executor_pb2.Start:
    """Everything of a request but its tensors' bytes; `time_left` counts from now, the current span is its parent.

    LimitExceededError if it is more than an executor reads.
    """
    trace = to_headers()
    start = executor_pb2.Start(
        request_id=call.request_id,
        fingerprint=fingerprint_digest,
        prompt_token_ids=plan.prompt_token_ids,
        items=[_media_item(item) for item in plan.items],
        sampling=call.sampling,
        traceparent=trace.get(TRACEPARENT),
        tracestate=trace.get(TRACESTATE),
        priority=call.priority,
    )
    if (seconds := call.deadline.time_left) is not None:
        start.time_left.FromNanoseconds(int(seconds * 1e9))
    # An executor that refuses to read a message ends its stream, and with it the requests of everybody else.
    check_readable(start)
    return start


def _media_item(item: PlannedItem) -> executor_pb2.MediaItem:
    return executor_pb2.MediaItem(
        info=media_info_to_proto(item.info),
        media_digest=item.media_digest,
        placeholder=placeholder_to_proto(item.placeholder),
        tensors=[_tensor(name, spec) for name, spec in item.tensors.items()],
    )


def _tensor(name: str, spec: TensorSpec) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(
        name=name,
        dtype=DTYPE_OF_NAME[spec.dtype],
        shape=spec.shape,
        chunks=tensor_pb2.ChunkedPayload(total_bytes=spec.num_bytes),
    )
