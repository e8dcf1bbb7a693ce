"""One error for everything a request can end with."""

from __future__ import annotations

from typing import Any

from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status


class RequestError(Exception):
    """A request that failed.

    `code` is the gRPC status name ("INVALID_ARGUMENT"); `details` are the facts of the error's ErrorInfo
    (stage, item, limit, actual, …) and, where trying again makes sense, `retry_after` in seconds.
    """

    def __init__(self, code: str, message: str, details: dict[str, str] | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.details = details or {}


def from_rpc_error(error: Any) -> RequestError:
    """The RequestError of a failed call, synchronous or asynchronous."""
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # the status details contradict the call's own status
        status = None
    return RequestError(error.code().name, error.details() or "", _details(status) if status is not None else None)


def _details(status: status_pb2.Status) -> dict[str, str]:
    facts: dict[str, str] = {}
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Unpack(info):
            facts.update(info.metadata)
        elif detail.Unpack(retry):
            facts["retry_after"] = f"{retry.retry_delay.ToNanoseconds() / 1e9:g}"
    return facts
