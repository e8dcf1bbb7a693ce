"""Encoder features by content digest: an item is encoded once, whoever asks for it and however often.

An entry is pinned while a request needs it. The capacity is strict: the scheduler puts an item off until there is
room. That cannot stop everybody: a request never needs a second item to get through the one it has pinned.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from executor_service.engine.block_manager import IntegrityError
from executor_service.engine.request import EncodedItem, EngineItem


class EncoderCache:
    """Features of at most `capacity` feature tokens, pinned and unpinned; least recently used go first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._entries: dict[bytes, EncodedItem] = {}
        self._private: dict[int, EncodedItem] = {}
        self._unpinned: OrderedDict[bytes, EncodedItem] = OrderedDict()
        self._num_features = 0

    @property
    def num_features(self) -> int:
        """Feature tokens it holds, or has promised room for."""
        return self._num_features

    @property
    def room(self) -> int:
        """Feature tokens that could be pinned besides those that are."""
        return self.capacity - self._num_features + sum(entry.num_features for entry in self._unpinned.values())

    def find(self, item: EngineItem) -> EncodedItem | None:
        """The entry of the item's content, if there is one."""
        return None if item.content_digest is None else self._entries.get(item.content_digest)

    def acquire(self, item: EngineItem) -> bool:
        """Pin the item's features; True if they are yet to be made. Never more than `room` at once."""
        entry = self.find(item)
        if entry is not None:
            self._unpinned.pop(item.content_digest or b"", None)
        else:
            entry = self._add(item)
        entry.num_users += 1
        item.encoded = entry
        return entry.num_users == 1 and entry.features is None

    def release(self, item: EngineItem) -> None:
        """The item's request does not need its features any more; without effect if it has none."""
        entry, item.encoded = item.encoded, EncodedItem()
        if not entry.num_users:
            return
        entry.num_users -= 1
        if entry.num_users:
            return
        if item.content_digest is not None and entry.features is not None:
            self._unpinned[item.content_digest] = entry
        else:
            self._drop(item.content_digest, entry)

    def _add(self, item: EngineItem) -> EncodedItem:
        entry = EncodedItem(num_features=item.layout.num_tokens)
        while self._unpinned and self._num_features + entry.num_features > self.capacity:
            digest, oldest = self._unpinned.popitem(last=False)
            self._drop(digest, oldest)
        self._num_features += entry.num_features
        if item.content_digest is None:
            self._private[id(entry)] = entry
        else:
            self._entries[item.content_digest] = entry
        return entry

    def _drop(self, digest: bytes | None, entry: EncodedItem) -> None:
        self._num_features -= entry.num_features
        if digest is None:
            del self._private[id(entry)]
        else:
            del self._entries[digest]

    def check_integrity(self, items: Iterable[EngineItem]) -> None:
        """IntegrityError unless entries are pinned by just these items, and no more is held than fits."""
        pins = Counter(id(item.encoded) for item in items if item.encoded.num_users)
        everything = [*self._entries.values(), *self._private.values()]
        for entry in everything:
            if pins.pop(id(entry), 0) != entry.num_users:
                raise IntegrityError("an encoder cache entry is not pinned as often as counted")
        if pins:
            raise IntegrityError("an item has features that the encoder cache does not know")
        unpinned = {id(entry) for entry in self._unpinned.values()}
        if unpinned != {id(entry) for entry in everything if not entry.num_users}:
            raise IntegrityError("the encoder cache's unpinned entries are not those without users")
        held = sum(entry.num_features for entry in everything)
        if held != self._num_features or held > self.capacity:
            raise IntegrityError(
                f"the encoder cache holds {held} features, {self._num_features} are counted, "
                f"{self.capacity} are allowed"
            )
