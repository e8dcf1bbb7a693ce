"""What can go wrong between a registration, a checkpoint and a request; each error says what is there instead.

`RegistryError` and its direct children are the developer's to mend; `MediaError` and its children are
about one request and carry the facts a client needs.
"""

from __future__ import annotations


class RegistryError(Exception):
    """A model family, its registration or its checkpoint is wrong."""


class UnknownArchitectureError(RegistryError):
    """No family is registered for the checkpoint's architecture."""


class UnknownModalityError(RegistryError):
    """A modality that does not exist, or that the family does not support."""


class MissingHookError(RegistryError):
    """A family without a layout leaves out a hook that has no default then."""


class InvalidHookError(RegistryError):
    """A hook returned something its contract forbids."""


class CheckpointError(RegistryError):
    """A checkpoint directory lacks something or says something no family understands."""


class MediaError(ValueError):
    """A request's media or placeholders are wrong.

    `item_index` is the item's place in the request (None: the request as a whole); `limit` and
    `actual` are set where a number was exceeded or missed.
    """

    def __init__(
        self, message: str, *, item_index: int | None = None, limit: int | None = None, actual: int | None = None
    ) -> None:
        super().__init__(message)
        self.item_index = item_index
        self.limit = limit
        self.actual = actual


class TooManyItemsError(MediaError):
    """More items of a modality than a prompt may have."""


class PlaceholderMismatchError(MediaError):
    """Placeholders and items differ in number or kind."""


class MediaSizeError(MediaError):
    """An item is larger than the limits allow."""


class UnusableMediaError(MediaError):
    """An item that the family cannot take, such as audio too short for a single feature; layouts raise it."""
