"""How long a request's name may be; both services check with this one function."""

from __future__ import annotations

from typing import Final

from diptych.service.errors import LimitExceededError

MAX_REQUEST_ID_LENGTH: Final = 128


def check_request_id(request_id: str) -> None:
    """LimitExceededError in stage "admit" for one of more characters."""
    if len(request_id) > MAX_REQUEST_ID_LENGTH:
        raise LimitExceededError(
            f"request_id has {len(request_id)} characters; at most {MAX_REQUEST_ID_LENGTH} are allowed",
            stage="admit",
            limit=MAX_REQUEST_ID_LENGTH,
            actual=len(request_id),
        )
