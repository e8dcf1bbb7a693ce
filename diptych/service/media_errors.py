"""The registry's errors about a request's media, as errors with a status."""

from __future__ import annotations

from diptych.service.errors import DiptychError, InvalidInputError, LimitExceededError
from registry.errors import MediaError, MediaSizeError, TooManyItemsError


def from_media_error(error: MediaError, stage: str) -> DiptychError:
    """INVALID_ARGUMENT with the same message, item and numbers; a size's message does not name the item itself."""
    is_of_an_item = isinstance(error, MediaSizeError) and error.item_index is not None
    message = f"item {error.item_index}: {error}" if is_of_an_item else str(error)
    kind = LimitExceededError if isinstance(error, TooManyItemsError | MediaSizeError) else InvalidInputError
    return kind(message, stage=stage, item=error.item_index, limit=error.limit, actual=error.actual)
