"""Items of admitted requests on their way in: what is here already, what is missed, credit, chunks, patience."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from diptych.service.errors import DeadlineError, DiptychError, InvalidInputError
from diptych.v1 import executor_pb2
from diptych.wire.framing import ItemChunk
from executor_service.engine.messages import ItemSlots, TensorSlot
from executor_service.front.admission import AdmittedItem
from executor_service.front.arena import Arena
from executor_service.front.assembly import ItemAssembly, content_digest, refusal
from executor_service.front.credit import CreditOffice, RequestCredit
from executor_service.front.item_store import Claim, ItemHold, ItemStore, StoredItem
from executor_service.front.request import FrontRequest, Pace

PACE_BYTES: Final = 1 << 20
PACE_PATIENCES: Final = 4
"""A sender that takes longer for so many bytes than four times what it may be silent keeps others out."""


@dataclass
class ReceptionCounters:
    """Since the boot: items and bytes of tensors that arrived, and those that were here already."""

    num_received_items: int = 0
    num_received_bytes: int = 0
    num_held_items: int = 0
    num_held_bytes: int = 0


class Reception:
    """`on_complete` is called once per request when all its items are there, `on_failed` when its sender stalls."""

    def __init__(
        self,
        arena: Arena,
        patience: float,
        on_complete: Callable[[FrontRequest], None],
        on_failed: Callable[[FrontRequest, DiptychError], None],
    ) -> None:
        self.store = ItemStore(arena)
        self.office = CreditOffice()
        self.counters = ReceptionCounters()
        self._patience = patience
        self._on_complete = on_complete
        self._on_failed = on_failed

    def begin(self, request: FrontRequest) -> None:
        """Ask for what is missing, as soon as there is room for it."""
        holds = [
            ItemHold(
                request.outlet.sender,
                item.media_digest,
                item.tensors,
                item.region_bytes,
                on_stored=partial(self._on_stored, request),
                on_left_alone=partial(self._on_left_alone, request, index),
            )
            for index, item in enumerate(request.admitted.items)
        ]
        request.claim = Claim(holds, partial(self._on_placed, request))
        request.credit = RequestCredit(request.outlet.window, partial(self._on_grant, request))
        self.store.place(request.claim)

    def receive(self, request: FrontRequest, chunk: ItemChunk) -> None:
        """Take a chunk; InvalidInputError if it is not one that was asked for."""
        assembly = self._assembly(request, chunk)
        assembly.check(chunk)
        credit, size = request.credit, len(chunk.data)
        assert credit is not None
        if size > credit.num_outstanding:
            raise _beyond_credit(chunk, credit.num_received + size, credit.num_granted)
        assembly.write(chunk)
        request.last_receipt = time.monotonic()
        self.counters.num_received_bytes += size
        self.office.receive(credit, size)
        if assembly.is_complete:
            self._complete(request, chunk.item_index)

    def end(self, request: FrontRequest) -> None:
        """Let go of everything."""
        if request.claim is None or request.credit is None:
            return
        if request.receive_timer is not None:
            request.receive_timer.cancel()
        self.office.close(request.credit)
        self.store.withdraw(request.claim)

    def slots(self, request: FrontRequest) -> tuple[ItemSlots, ...]:
        """What the engine is told of a complete request's items."""
        return tuple(
            ItemSlots(
                item.placeholder.offset, item.placeholder.length, item.info, stored.tensors, _digest(item, stored)
            )
            for item, stored in _stored(request)
        )

    def expected_slots(self, request: FrontRequest) -> tuple[ItemSlots, ...]:
        """The same before they are complete: tensors are nowhere yet, and there are no digests."""
        return tuple(
            ItemSlots(
                item.placeholder.offset,
                item.placeholder.length,
                item.info,
                tuple(TensorSlot(name, spec.dtype, spec.shape, 0, spec.num_bytes) for name, spec in item.tensors),
                b"",
            )
            for item in request.admitted.items
        )

    def contents(self, request: FrontRequest) -> tuple[tuple[tuple[int, ...], ...], tuple[bytes, ...]]:
        """What `expected_slots` lacks: by item, where its tensors are, in the same order, and its digest."""
        offsets, digests = [], []
        for item, stored in _stored(request):
            places = {slot.name: slot.arena_offset for slot in stored.tensors}
            offsets.append(tuple(places[name] for name, _ in item.tensors))
            digests.append(_digest(item, stored))
        return tuple(offsets), tuple(digests)

    def check_integrity(self, requests: Iterable[FrontRequest]) -> None:
        """AssertionError unless arena, items and credit are whole and belong to live requests."""
        requests = list(requests)
        self.store.check_integrity(hold for request in requests for hold in _holds(request))
        outstanding = sum(request.credit.num_outstanding for request in requests if request.credit)
        if outstanding != self.office.total.num_outstanding:
            raise AssertionError(
                f"{self.office.total.num_outstanding} bytes of credit are out, live requests have {outstanding}"
            )

    # --- what happens -------------------------------------------------------------------------------

    def _on_placed(self, request: FrontRequest) -> None:
        missing = [index for index, hold in enumerate(_holds(request)) if hold.is_missing]
        self._count_held(request)
        request.is_placed = True
        self._ask_for(request, missing)
        if request.error is None:
            self._check_progress(request)
            self._on_stored(request)

    def _count_held(self, request: FrontRequest) -> None:
        for item, hold in zip(request.admitted.items, _holds(request), strict=True):
            if hold.stored is not None:
                self.counters.num_held_items += 1
                self.counters.num_held_bytes += sum(spec.num_bytes for _, spec in item.tensors)

    def _on_left_alone(self, request: FrontRequest, index: int) -> None:
        """The request that was to receive this item has ended: this one asks for it itself."""
        if request.error is None:
            self._ask_for(request, [index])

    def end_of_chunks(self, request: FrontRequest) -> None:
        """The sender has said its last word: a request that still misses something can never be complete."""
        if request.is_placed and not request.is_at_engine and not all(hold.stored for hold in _holds(request)):
            self._fail_unfinished(request)

    def _fail_unfinished(self, request: FrontRequest) -> None:
        missing = [index for index, hold in enumerate(_holds(request)) if hold.stored is None]
        self._on_failed(
            request,
            InvalidInputError(
                f"the stream was half-closed before all of items {missing} had arrived",
                stage="receive",
                item=missing[0],
            ),
        )

    def _on_grant(self, request: FrontRequest, num_bytes: int) -> None:
        request.last_receipt = time.monotonic()
        credit = executor_pb2.Credit(handle=request.handle, bytes=num_bytes)
        request.outlet.put(executor_pb2.ExecuteResponse(credit=credit))

    def _on_stored(self, request: FrontRequest) -> None:
        if not request.is_at_engine and request.error is None and all(hold.stored for hold in _holds(request)):
            self._on_complete(request)

    def _ask_for(self, request: FrontRequest, indices: Sequence[int]) -> None:
        if indices and request.outlet.is_half_closed:
            self._fail_unfinished(request)
            return
        missing = executor_pb2.MissingItems(handle=request.handle, item_indices=indices)
        request.outlet.put(executor_pb2.ExecuteResponse(missing_items=missing))
        for index in indices:
            region = _holds(request)[index].region
            assert region is not None
            request.assemblies[index] = ItemAssembly(
                index, request.admitted.items[index], self.store.arena.view, region
            )
        assert request.credit is not None
        self.office.want(request.credit, sum(request.assemblies[index].num_bytes for index in indices))
        for index in indices:
            if request.error is None and request.assemblies[index].is_complete:
                self._complete(request, index)

    def _complete(self, request: FrontRequest, index: int) -> None:
        assembly = request.assemblies.pop(index)
        try:
            assembly.check_values()
        except DiptychError as error:
            self._on_failed(request, error)
            return
        self.counters.num_received_items += 1
        self.store.complete(_holds(request)[index], assembly.tensors_digest(), assembly.slots())

    def _assembly(self, request: FrontRequest, chunk: ItemChunk) -> ItemAssembly:
        count = len(request.admitted.items)
        if chunk.item_index >= count:
            message = f"a chunk is for item {chunk.item_index}; the request has {count} items"
            raise refusal(chunk, message, count, chunk.item_index)
        if not request.is_placed:
            raise _beyond_credit(chunk, len(chunk.data), 0)
        assembly = request.assemblies.get(chunk.item_index)
        if assembly is None:
            message = f"a chunk is for item {chunk.item_index}, of which nothing is missing"
            raise refusal(chunk, message, 0, len(chunk.data))
        return assembly

    # --- patience -----------------------------------------------------------------------------------

    def _watch(self, request: FrontRequest, seconds: float) -> None:
        request.receive_timer = asyncio.get_running_loop().call_later(seconds, self._check_progress, request)

    def _check_progress(self, request: FrontRequest) -> None:
        """A sender that has credit and sends next to nothing is not waited for; one without credit waits for us."""
        if request.is_at_engine or request.error is not None or request.credit is None:
            return
        now, credit = time.monotonic(), request.credit
        waiting = now - request.last_receipt if credit.num_outstanding else 0.0
        if waiting >= self._patience:
            self._fail_stalled(request, "no byte", self._patience, credit.num_outstanding)
            return
        pace, span = request.pace, PACE_PATIENCES * self._patience
        if pace is None or now - pace.moment >= span:
            num_bytes = credit.num_received - pace.num_received if pace is not None else 0
            if pace is not None and num_bytes < min(PACE_BYTES, pace.num_outstanding):
                self._fail_stalled(request, f"no more than {num_bytes} bytes", span, pace.num_outstanding)
                return
            request.pace = pace = Pace(now, credit.num_received, credit.num_outstanding)
        self._watch(request, min(self._patience - waiting, span - (now - pace.moment)))

    def _fail_stalled(self, request: FrontRequest, what: str, seconds: float, num_bytes: int) -> None:
        message = f"{what} arrived for {seconds:g} s, {num_bytes} were asked for"
        self._on_failed(request, DeadlineError(message, stage="receive", limit=seconds))


def _holds(request: FrontRequest) -> Sequence[ItemHold]:
    return request.claim.holds if request.claim is not None else ()


def _stored(request: FrontRequest) -> Iterable[tuple[AdmittedItem, StoredItem]]:
    """The items of a request that is complete."""
    for item, hold in zip(request.admitted.items, _holds(request), strict=True):
        assert hold.stored is not None
        yield item, hold.stored


def _digest(item: AdmittedItem, stored: StoredItem) -> bytes:
    return content_digest(stored.tensors_digest, item.info.modality, item.layout)


def _beyond_credit(chunk: ItemChunk, sent: int, granted: int) -> DiptychError:
    return refusal(chunk, f"{sent} bytes sent, credit was given for {granted}", granted, sent)
