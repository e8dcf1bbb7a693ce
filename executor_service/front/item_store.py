"""Item tensors in the arena: received once, kept by content, and looked up by what senders call them.

A sender offers a media digest; where the same peer has sent an item under it before, and the item is still here,
nothing needs to be sent. The digest is only a look-up key: the tensors found must have the shapes that this
request's own layout asks for, and their content digest, computed from what arrived, is what everything behind
the front goes by. Items nobody uses stay until the room is needed, least recently used first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from executor_service.engine.messages import TensorSlot
from executor_service.front.arena import Arena, Region
from executor_service.front.claims import NamedSpecs

MAX_ALIASES: Final = 65_536
Shapes = dict[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape by name."""


@dataclass(frozen=True)
class Sender:
    """Who sends: `peer` is who it has proved to be (empty without TLS), `stream` one of its streams."""

    peer: str
    stream: int


@dataclass(eq=False)
class StoredItem:
    """A complete item: `tensors_digest` is SHA-256 over its tensors' names, dtypes, shapes and bytes."""

    tensors_digest: bytes
    tensors: tuple[TensorSlot, ...]
    region: Region
    num_users: int = 0

    @property
    def shapes(self) -> Shapes:
        """Dtype and shape of each tensor."""
        return {slot.name: (slot.dtype, slot.shape) for slot in self.tensors}


@dataclass(eq=False)
class ItemHold:
    """One request's hold on one of its items.

    Once placed it is one of: `stored` (complete and pinned), to be received into `region`, or behind `leader`,
    the same item on its way for another request of the same stream.
    """

    sender: Sender
    media_digest: bytes | None
    specs: NamedSpecs
    num_bytes: int
    on_stored: Callable[[], None]
    on_left_alone: Callable[[], None]
    stored: StoredItem | None = None
    region: Region | None = None
    leader: ItemHold | None = None
    followers: list[ItemHold] = field(default_factory=list)

    @property
    def is_missing(self) -> bool:
        """Whether the sender has to send it."""
        return self.region is not None

    @property
    def shapes(self) -> Shapes:
        """Dtype and shape of each tensor it must have."""
        return {name: (spec.dtype, spec.shape) for name, spec in self.specs}


@dataclass(eq=False)
class Claim:
    """All items of one request, placed together when it is their turn."""

    holds: Sequence[ItemHold]
    on_placed: Callable[[], None]


class ItemStore:
    """Places claims in order of asking, so that a large one is never overtaken, and none waits while it holds."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self._stored: dict[bytes, StoredItem] = {}
        self._unused: OrderedDict[bytes, StoredItem] = OrderedDict()
        self._aliases: OrderedDict[tuple[str, bytes], bytes] = OrderedDict()
        self._on_the_way: dict[tuple[Sender, bytes], ItemHold] = {}
        self._receiving: set[ItemHold] = set()
        self._waiting: deque[Claim] = deque()

    @property
    def num_unused_bytes(self) -> int:
        """Bytes kept for items that no request uses now."""
        return sum(item.region.num_bytes for item in self._unused.values())

    # --- claims -------------------------------------------------------------------------------------

    def place(self, claim: Claim) -> None:
        """Call `claim.on_placed` once every item is stored, being received, or has room to be; at once if possible."""
        self._waiting.append(claim)
        self._place_waiting()

    def withdraw(self, claim: Claim) -> None:
        """Give a claim up: what is held is let go, what was being received is handed over or forgotten."""
        if claim in self._waiting:
            self._waiting.remove(claim)
        # The last first: an item must not be handed on to another of the same claim.
        for hold in reversed(claim.holds):
            self._let_go(hold)
        self._place_waiting()

    def complete(self, hold: ItemHold, tensors_digest: bytes, tensors: tuple[TensorSlot, ...]) -> None:
        """Everything of a missing item has arrived: store it, for its followers too."""
        assert hold.region is not None
        region, hold.region = hold.region, None
        self._forget(hold)
        stored = self._stored.get(tensors_digest)
        if stored is None:
            stored = self._stored[tensors_digest] = StoredItem(tensors_digest, tensors, region)
        else:
            self.arena.release(region)
        self._name(hold, tensors_digest)
        followers, hold.followers = hold.followers, []
        for each in (hold, *followers):
            each.leader = None
            self._pin(each, stored)
        for each in (hold, *followers):
            each.on_stored()
        self._place_waiting()

    # --- looking up ---------------------------------------------------------------------------------

    def _find(self, hold: ItemHold) -> StoredItem | None:
        if hold.media_digest is None:
            return None
        digest = self._aliases.get((hold.sender.peer, hold.media_digest))
        stored = None if digest is None else self._stored.get(digest)
        return stored if stored is not None and stored.shapes == hold.shapes else None

    def _find_leader(self, hold: ItemHold) -> ItemHold | None:
        if hold.media_digest is None:
            return None
        leader = self._on_the_way.get((hold.sender, hold.media_digest))
        return leader if leader is not None and leader.shapes == hold.shapes else None

    def _name(self, hold: ItemHold, tensors_digest: bytes) -> None:
        """From now on the peer's media digest means this content."""
        if hold.media_digest is None:
            return
        key = (hold.sender.peer, hold.media_digest)
        self._aliases[key] = tensors_digest
        self._aliases.move_to_end(key)
        if len(self._aliases) > MAX_ALIASES:
            self._aliases.popitem(last=False)

    # --- placing ------------------------------------------------------------------------------------

    def _place_waiting(self) -> None:
        while self._waiting and self._try_to_place(self._waiting[0]):
            self._waiting.popleft().on_placed()

    def _try_to_place(self, claim: Claim) -> bool:
        """All of the claim's items or none."""
        for hold in claim.holds:
            if (stored := self._find(hold)) is not None:
                self._pin(hold, stored)
        if self._receive_missing(claim):
            return True
        for hold in claim.holds:
            self._let_go(hold)
        if self._receiving or len(self._unused) < len(self._stored):
            return False
        # What it found here lies in its own way, and nobody else will ever make room: it is sent once more.
        while self._unused:
            self._forget_oldest()
        return self._receive_missing(claim)

    def _receive_missing(self, claim: Claim) -> bool:
        """Find room for whatever is not here and not on its way."""
        missing = self._follow([hold for hold in claim.holds if hold.stored is None])
        regions = self._take([hold.num_bytes for hold in missing])
        if regions is None:
            return False
        for hold, region in zip(missing, regions, strict=True):
            self._receive_into(hold, region)
        return True

    def _follow(self, holds: Sequence[ItemHold]) -> list[ItemHold]:
        """Put holds behind those that receive the same; returns the others, each of which is received."""
        missing: dict[bytes | int, ItemHold] = {}
        for hold in holds:
            leader = self._find_leader(hold)
            if leader is None and hold.media_digest is not None:
                leader = missing.get(hold.media_digest)
                leader = leader if leader is not None and leader.shapes == hold.shapes else None
            if leader is None:
                missing[hold.media_digest or id(hold)] = hold
            else:
                hold.leader = leader
                leader.followers.append(hold)
        return [hold for hold in holds if hold.leader is None]

    def _take(self, sizes: Sequence[int]) -> list[Region] | None:
        """Room for each or for none, by forgetting what nobody uses if need be."""
        regions: list[Region] = []
        for num_bytes in sizes:
            while (region := self.arena.take(num_bytes)) is None and self._unused:
                self._forget_oldest()
            if region is None:
                for taken in regions:
                    self.arena.release(taken)
                return None
            regions.append(region)
        return regions

    def _forget_oldest(self) -> None:
        digest, oldest = self._unused.popitem(last=False)
        del self._stored[digest]
        self.arena.release(oldest.region)

    def _receive_into(self, hold: ItemHold, region: Region) -> None:
        hold.region, hold.leader = region, None
        self._receiving.add(hold)
        if hold.media_digest is not None:
            self._on_the_way.setdefault((hold.sender, hold.media_digest), hold)

    def _forget(self, hold: ItemHold) -> None:
        """It is not on its way any more."""
        self._receiving.discard(hold)
        if hold.media_digest is not None and self._on_the_way.get((hold.sender, hold.media_digest)) is hold:
            del self._on_the_way[hold.sender, hold.media_digest]

    # --- pins ---------------------------------------------------------------------------------------

    def _pin(self, hold: ItemHold, stored: StoredItem) -> None:
        self._unused.pop(stored.tensors_digest, None)
        stored.num_users += 1
        hold.stored = stored

    def _let_go(self, hold: ItemHold) -> None:
        if hold.stored is not None:
            self._unpin(hold.stored)
            hold.stored = None
        if hold.leader is not None:
            hold.leader.followers.remove(hold)
            hold.leader = None
        if hold.region is not None:
            self._leave(hold)
        elif hold.followers:
            # A claim that could not be placed: its own items followed each other.
            for follower in hold.followers:
                follower.leader = None
            hold.followers.clear()

    def _unpin(self, stored: StoredItem) -> None:
        stored.num_users -= 1
        if not stored.num_users:
            self._unused[stored.tensors_digest] = stored

    def _leave(self, hold: ItemHold) -> None:
        """Nobody sends this item for this hold any more; the first follower inherits its place and asks anew."""
        assert hold.region is not None
        region, hold.region = hold.region, None
        self._forget(hold)
        followers, hold.followers = hold.followers, []
        if not followers:
            self.arena.release(region)
            return
        heir, *rest = followers
        self._receive_into(heir, region)
        heir.followers = rest
        for follower in rest:
            follower.leader = heir
        heir.on_left_alone()

    # --- proof --------------------------------------------------------------------------------------

    def check_integrity(self, holds: Iterable[ItemHold]) -> None:
        """AssertionError unless the arena is whole and every byte of it is stored or being received for `holds`."""
        self.arena.check_integrity()
        holds = list(holds)
        pins = Counter(hold.stored.tensors_digest for hold in holds if hold.stored is not None)
        counted = {digest: item.num_users for digest, item in self._stored.items() if item.num_users}
        if counted != pins:
            raise AssertionError("stored items are not pinned as often as counted")
        if {digest for digest, item in self._stored.items() if not item.num_users} != set(self._unused):
            raise AssertionError("the items without users are not those that may be forgotten")
        receiving = {hold for hold in holds if hold.region is not None}
        if receiving != self._receiving or not set(self._on_the_way.values()) <= receiving:
            raise AssertionError("items are being received for requests that have ended")
        regions = [*(item.region for item in self._stored.values()), *(hold.region for hold in receiving)]
        if sum(region.num_bytes for region in regions if region) != self.arena.num_used_bytes:
            raise AssertionError("the arena has bytes in use that belong to no item")
