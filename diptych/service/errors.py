"""Typed errors and their one mapping to gRPC status and google.rpc details.

Raise the class that fits where the fact is known; the interceptor turns it into a status.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

DOMAIN: Final = "diptych.dev"
_MAX_MESSAGE: Final = 1200
"""Bytes in UTF-8. A status travels as HTTP/2 metadata, escaped and in base64, of which clients take 8 KiB."""
_MAX_FACT: Final = 200
_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}


class DiptychError(Exception):
    """Base of everything a request can end with.

    `stage` names where it happened ("admit", "probe", "decode", …); `item` is the media item's index;
    `limit` and `actual` are the two numbers of an exceeded limit; `retry_after` (seconds) is set where
    trying again makes sense.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        stage: str,
        item: int | None = None,
        limit: float | None = None,
        actual: float | None = None,
        retry_after: float | None = None,
        **facts: object,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.stage = stage
        self.item = item
        self.limit = limit
        self.actual = actual
        self.retry_after = retry_after
        self.facts = facts

    @property
    def metadata(self) -> dict[str, str]:
        """The facts as strings, for ErrorInfo."""
        facts = {"stage": self.stage, "item": self.item, "limit": self.limit, "actual": self.actual, **self.facts}
        known = {name: _cut(str(value), _MAX_FACT) for name, value in facts.items() if value is not None}
        return {**known, "retryable": "true" if self.retry_after is not None else "false"}

    def to_status(self) -> status_pb2.Status:
        """The error as google.rpc.Status with ErrorInfo and, where it applies, RetryInfo."""
        info = error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=self.metadata)
        details = [_packed(info)]
        if self.retry_after is not None:
            delay = duration_pb2.Duration()
            delay.FromNanoseconds(int(self.retry_after * 1e9))
            details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
        return status_pb2.Status(code=self.code.value[0], message=_cut(self.message, _MAX_MESSAGE), details=details)


def _cut(text: str, max_bytes: int) -> str:
    """What the sender wrote may be in it, of any length."""
    encoded = text.encode(errors="replace")
    return text if len(encoded) <= max_bytes else encoded[: max_bytes - 3].decode(errors="ignore") + "…"


class InvalidInputError(DiptychError):
    """The request is wrong in itself."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_INPUT"


class LimitExceededError(DiptychError):
    """The request is larger than a limit; sent again it fails again."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "LIMIT_EXCEEDED"


class OverloadedError(DiptychError):
    """No room now; `retry_after` says when to try again."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "OVERLOADED"


class NotFoundError(DiptychError):
    """A name that does not exist."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "NOT_FOUND"


class IncompatibleError(DiptychError):
    """The two services would disagree on tokens, pixels or shapes."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "INCOMPATIBLE"


class UnimplementedError(DiptychError):
    """A field of the contract that this version does not serve yet."""

    code = grpc.StatusCode.UNIMPLEMENTED
    reason = "UNIMPLEMENTED"


class UnavailableError(DiptychError):
    """A part that is needed is away."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "UNAVAILABLE"


class DeadlineError(DiptychError):
    """The request's deadline passed; `stage` names where it was."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"


class RequestCancelledError(DiptychError):
    """The client cancelled or went away."""

    code = grpc.StatusCode.CANCELLED
    reason = "CANCELLED"


class InternalError(DiptychError):
    """Our fault; the log has the details."""


class RemoteError(DiptychError):
    """An error another service gave, passed on as it is."""

    def __init__(self, status: status_pb2.Status) -> None:
        facts = _error_info(status)
        super().__init__(status.message, stage=facts.pop("stage", "executor"))
        self._status = status

    def to_status(self) -> status_pb2.Status:
        """The status as it was received."""
        return self._status


def _packed(message: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _error_info(status: status_pb2.Status) -> dict[str, str]:
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Unpack(info):
            return dict(info.metadata)
    return {}


def status_code(status: status_pb2.Status) -> grpc.StatusCode:
    """The gRPC code of a google.rpc.Status; UNKNOWN for a number gRPC does not know."""
    return _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
