"""The registry's errors about a request's media, as errors with a status."""

from __future__ import annotations

from diptych.service.errors import DiptychError, InvalidInputError, LimitExceededError
from registry.errors import MediaError, MediaSizeError, TooManyItemsError


def from_media_error(error: MediaError, stage: str) -> DiptychError:
    """INVALID_ARGUMENT with the same message, item and numbers."""
    kind = LimitExceededError if isinstance(error, TooManyItemsError | MediaSizeError) else InvalidInputError
    return kind(str(error), stage=stage, item=error.item_index, limit=error.limit, actual=error.actual)
