"""The item store: found by digest, per peer and by shape; never leaking, never overtaken, whatever happens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from executor_service.engine.messages import TensorSlot
from executor_service.front import item_store
from executor_service.front.arena import ALIGNMENT, Arena
from executor_service.front.item_store import Claim, ItemHold, ItemStore, Sender
from registry import TensorSpec

ALICE, BOB = Sender("alice", 1), Sender("bob", 2)
NUM_UNITS = 12


def key(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


@dataclass(eq=False)
class Requester:
    """One request's claim and what it was told."""

    claim: Claim = field(init=False)
    is_placed: bool = False
    num_stored_calls: int = 0
    left_alone: list[int] = field(default_factory=list)

    @property
    def holds(self) -> list[ItemHold]:
        return list(self.claim.holds)

    @property
    def is_complete(self) -> bool:
        return all(hold.stored for hold in self.holds)


def claim_for(store: ItemStore, sender: Sender, items: list[tuple[str | None, int]]) -> Requester:
    """Items are (name, size in alignment units); None: without a media digest."""
    requester = Requester()

    def stored() -> None:
        requester.num_stored_calls += 1

    holds = [
        ItemHold(
            sender, None if name is None else key(name), (("x", TensorSpec("uint8", (units * ALIGNMENT,))),),
            units * ALIGNMENT, stored, lambda index=index: requester.left_alone.append(index),
        )
        for index, (name, units) in enumerate(items)
    ]  # fmt: skip
    requester.claim = Claim(holds, lambda: setattr(requester, "is_placed", True))
    store.place(requester.claim)
    return requester


def complete(store: ItemStore, hold: ItemHold, content: str) -> None:
    """The item's bytes have arrived, and this is what they are."""
    assert hold.region is not None
    slot = TensorSlot("x", "uint8", (hold.num_bytes,), hold.region.offset, hold.num_bytes)
    store.complete(hold, key(f"{content} {hold.num_bytes}"), (slot,))


@pytest.fixture
def store() -> Iterator[ItemStore]:
    arena = Arena(NUM_UNITS * ALIGNMENT)
    yield ItemStore(arena)
    arena.close()


def receive(store: ItemStore, sender: Sender, name: str, units: int, content: str | None = None) -> Requester:
    requester = claim_for(store, sender, [(name, units)])
    assert requester.holds[0].is_missing
    complete(store, requester.holds[0], content or name)
    return requester


def test_what_a_peer_has_sent_is_not_asked_for_again(store: ItemStore) -> None:
    first = receive(store, ALICE, "cat", 2)
    store.withdraw(first.claim)
    second = claim_for(store, Sender("alice", 99), [("cat", 2)])
    assert second.is_placed
    assert second.holds[0].stored is not None
    store.check_integrity(second.holds)


def test_an_alias_belongs_to_its_peer(store: ItemStore) -> None:
    """Bob's digest is Bob's word: it gets him nothing of Alice's, and cannot change what hers means."""
    alice = receive(store, ALICE, "cat", 2, content="a cat")
    bob = claim_for(store, BOB, [("cat", 2)])
    assert bob.holds[0].is_missing
    complete(store, bob.holds[0], "a dog")
    again = claim_for(store, ALICE, [("cat", 2)])
    assert again.holds[0].stored is alice.holds[0].stored
    assert bob.holds[0].stored is not alice.holds[0].stored


def test_equal_content_is_kept_once(store: ItemStore) -> None:
    alice = receive(store, ALICE, "cat", 2, content="same")
    bob = receive(store, BOB, "kitten", 2, content="same")
    assert alice.holds[0].stored is bob.holds[0].stored
    assert store.arena.num_used_bytes == 2 * ALIGNMENT
    store.check_integrity([*alice.holds, *bob.holds])


def test_other_content_under_the_same_digest_moves_the_alias(store: ItemStore) -> None:
    first = claim_for(store, ALICE, [("cat", 2)])
    other_stream = claim_for(store, Sender("alice", 7), [("cat", 2)])
    assert other_stream.holds[0].is_missing
    complete(store, first.holds[0], "one")
    complete(store, other_stream.holds[0], "two")
    assert first.holds[0].stored is not other_stream.holds[0].stored
    assert claim_for(store, ALICE, [("cat", 2)]).holds[0].stored is other_stream.holds[0].stored


def test_another_shape_is_another_item(store: ItemStore) -> None:
    receive(store, ALICE, "cat", 2)
    assert claim_for(store, ALICE, [("cat", 3)]).holds[0].is_missing


def test_an_item_on_its_way_is_awaited_and_inherited(store: ItemStore) -> None:
    first, second, third = (claim_for(store, ALICE, [("cat", 2)]) for _ in range(3))
    assert first.holds[0].is_missing
    assert not second.holds[0].is_missing
    assert second.is_placed
    region = first.holds[0].region
    store.withdraw(first.claim)
    assert second.left_alone == [0]
    assert second.holds[0].region == region
    assert third.left_alone == []
    complete(store, second.holds[0], "cat")
    assert third.is_complete
    assert third.num_stored_calls == 1
    store.check_integrity([*second.holds, *third.holds])


def test_an_alias_that_is_named_again_is_young_again(store: ItemStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_store, "MAX_ALIASES", 2)
    early, late = (claim_for(store, Sender("alice", stream), [("hot", 1)]).holds[0] for stream in (1, 2))
    complete(store, early, "hot")
    receive(store, ALICE, "cold", 1)
    complete(store, late, "hot")
    receive(store, ALICE, "new", 1)
    found = {name: claim_for(store, ALICE, [(name, 1)]).is_complete for name in ("hot", "cold", "new")}
    assert found == {"hot": True, "cold": False, "new": True}


def test_aliases_are_bounded_and_the_one_named_longest_ago_goes(
    store: ItemStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The item itself stays, and is kept once when it is sent again."""
    monkeypatch.setattr(item_store, "MAX_ALIASES", 3)
    for name in ("first", "second", "third"):
        receive(store, ALICE, name, 1)
    repeats = [claim_for(store, Sender("alice", stream), [("other", 1)]) for stream in (1, 2)]
    complete(store, repeats[0].holds[0], "other")
    complete(store, repeats[1].holds[0], "other")  # named again: none is forgotten for it
    assert len(store._aliases) == 3
    names = ("first", "second", "third", "other")
    found = {name: not claim_for(store, BOB, [(name, 1)]).holds[0].is_missing for name in names}
    assert not any(found.values())
    found = {name: claim_for(store, ALICE, [(name, 1)]).is_complete for name in names}
    assert found == {"first": False, "second": True, "third": True, "other": True}
    num_bytes = store.arena.num_used_bytes
    again = claim_for(store, Sender("alice", 9), [("first", 1)])
    complete(store, again.holds[0], "first")
    assert store.arena.num_used_bytes == num_bytes


def test_one_picture_twice_in_a_request_is_sent_once(store: ItemStore) -> None:
    requester = claim_for(store, ALICE, [("cat", 2), ("dog", 1), ("cat", 2)])
    assert [hold.is_missing for hold in requester.holds] == [True, True, False]
    complete(store, requester.holds[0], "cat")
    complete(store, requester.holds[1], "dog")
    assert requester.is_complete


def test_the_least_recently_used_goes_first(store: ItemStore) -> None:
    for name in ("a", "b", "c"):
        store.withdraw(receive(store, ALICE, name, 4).claim)
    store.withdraw(claim_for(store, ALICE, [("a", 4)]).claim)
    store.withdraw(receive(store, ALICE, "d", 4).claim)
    found = {name: claim_for(store, ALICE, [(name, 4)]) for name in ("a", "d")}
    assert all(requester.is_complete for requester in found.values())
    assert claim_for(store, ALICE, [("b", 4)]).holds[0].is_missing


def test_a_large_claim_is_not_overtaken_and_holds_nothing_while_it_waits(store: ItemStore) -> None:
    running = receive(store, ALICE, "a", 6)
    large = claim_for(store, ALICE, [("a", 6), ("b", 7)])
    small = claim_for(store, ALICE, [("c", 1)])
    assert not large.is_placed
    assert not small.is_placed
    assert all(hold.stored is None for hold in large.holds)
    store.withdraw(running.claim)
    assert not large.is_placed, "13 units do not fit into 12"
    store.withdraw(large.claim)
    assert small.is_placed


def test_a_claim_is_not_kept_out_by_what_it_found(store: ItemStore) -> None:
    """Its one stored item lies in the middle, and the rest fits on neither side: it is received anew."""
    neighbour, middle = receive(store, ALICE, "neighbour", 5), receive(store, ALICE, "middle", 2)
    claim = claim_for(store, ALICE, [("middle", 2), ("large", 8)])
    store.withdraw(middle.claim)
    assert not claim.is_placed
    store.withdraw(neighbour.claim)
    assert [hold.is_missing for hold in claim.holds] == [True, True]
    store.check_integrity(claim.holds)


def test_what_it_found_stays_while_others_may_make_room(store: ItemStore) -> None:
    kept, other = receive(store, ALICE, "kept", 2), receive(store, ALICE, "other", 5)
    claim = claim_for(store, ALICE, [("kept", 2), ("large", 8)])
    store.withdraw(kept.claim)
    assert not claim.is_placed
    store.withdraw(other.claim)
    assert claim.is_placed
    assert [hold.is_missing for hold in claim.holds] == [False, True]
    store.check_integrity(claim.holds)


def test_room_taken_for_some_items_is_given_back_with_the_others(store: ItemStore) -> None:
    running = receive(store, ALICE, "running", 6)
    claim = claim_for(store, ALICE, [("small", 4), ("large", 8)])
    assert not claim.is_placed
    store.check_integrity([*running.holds, *claim.holds])
    assert store.arena.num_used_bytes == 6 * ALIGNMENT


def test_a_claim_hands_nothing_on_to_itself(store: ItemStore) -> None:
    """One picture twice in a request that ends before it has arrived: nobody is asked for it any more."""
    requester = claim_for(store, ALICE, [("cat", 2), ("dog", 1), ("cat", 2)])
    store.withdraw(requester.claim)
    assert requester.left_alone == []
    store.check_integrity([])
    assert store.arena.num_used_bytes == 0


class StoreMachine(RuleBasedStateMachine):
    """Requests of two peers claim, receive and end in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(NUM_UNITS * ALIGNMENT)
        self.store = ItemStore(self.arena)
        self.live: list[Requester] = []
        self.num_placed = 0

    @rule(
        sender=st.sampled_from([ALICE, BOB, Sender("alice", 3)]),
        names=st.lists(st.sampled_from(["a", "b", "c", "d", None]), min_size=1, max_size=3),
    )
    def claim(self, sender: Sender, names: list[str | None]) -> None:
        sizes = {"a": 1, "b": 2, "c": 3, "d": 4, None: 2}
        self.live.append(claim_for(self.store, sender, [(name, sizes[name]) for name in names]))

    @rule(index=st.integers(0, 30), content=st.sampled_from(["one", "two"]))
    def arrive(self, index: int, content: str) -> None:
        missing = [hold for requester in self.live for hold in requester.holds if hold.is_missing]
        if missing:
            complete(self.store, missing[index % len(missing)], content)

    @rule(index=st.integers(0, 30))
    def end(self, index: int) -> None:
        if self.live:
            self.store.withdraw(self.live.pop(index % len(self.live)).claim)

    @invariant()
    def whole(self) -> None:
        self.store.check_integrity(hold for requester in self.live for hold in requester.holds)

    @invariant()
    def placed_in_order_and_entirely(self) -> None:
        placed = [requester.is_placed for requester in self.live]
        assert placed == sorted(placed, reverse=True)
        for requester in self.live:
            states = [(h.stored is not None) + (h.region is not None) + (h.leader is not None) for h in requester.holds]
            assert states == [1 if requester.is_placed else 0] * len(states)
            leaders = [hold.leader for hold in requester.holds if hold.leader]
            assert all(leader.is_missing for leader in leaders), "it waits for what nobody sends"

    def teardown(self) -> None:
        """Everybody is served in the end."""
        for _ in range(200):
            if not self.live:
                break
            self.arrive(0, "one")
            for requester in [r for r in self.live if r.is_placed and r.is_complete]:
                self.live.remove(requester)
                self.store.withdraw(requester.claim)
            self.whole()
        assert not self.live
        assert self.store.num_unused_bytes == self.arena.num_used_bytes
        self.arena.close()


StoreMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestStore = StoreMachine.TestCase
