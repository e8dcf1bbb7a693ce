"""Reassembly under credit: what is granted, what is refused, and what the engine is told."""

from __future__ import annotations

import numpy as np
import pytest

from diptych.service.errors import InvalidInputError
from diptych.wire.framing import CHUNK_BYTES, ItemChunk, split_tensor
from executor_service.front.admission import AdmittedItem
from executor_service.front.arena import Region
from executor_service.front.assembly import CREDIT_WINDOW, Assembly
from registry import ItemLayout, MediaInfo, PlaceholderRange, Run, TensorSpec

BIG = 3 * CREDIT_WINDOW + 12345


def item(**sizes: int) -> AdmittedItem:
    specs = {name: TensorSpec("uint8", (size,)) for name, size in sizes.items()}
    layout = ItemLayout((Run(7, 4),), specs)
    return AdmittedItem(MediaInfo.image(5, 6), PlaceholderRange(2, 4), layout, tuple(specs.items()))


def memory(assembly: Assembly) -> tuple[memoryview, Region]:
    return memoryview(bytearray(assembly.region_bytes + 256)), Region(256, assembly.region_bytes)


def test_credit_never_exceeds_the_window_and_adds_up() -> None:
    assembly = Assembly([item(a=BIG)])
    view, region = memory(assembly)
    data = np.random.default_rng(0).integers(0, 256, BIG, dtype=np.uint8)
    granted, received = assembly.grant(), 0
    assert granted == CREDIT_WINDOW
    for chunk in split_tensor(1, 0, 0, memoryview(data)):
        assert received + len(chunk.data) <= granted
        assembly.accept(chunk, view, region)
        received += len(chunk.data)
        granted += assembly.grant()
        assert granted - received <= CREDIT_WINDOW
    assert granted == BIG
    assert assembly.is_complete
    (slots,) = assembly.slots(region)
    slot = slots.tensors[0]
    assert bytes(view[slot.arena_offset : slot.arena_offset + slot.num_bytes]) == data.tobytes()


def test_more_than_the_credit_is_refused() -> None:
    assembly = Assembly([item(a=BIG)])
    view, region = memory(assembly)
    assembly.grant()
    chunks = split_tensor(1, 0, 0, memoryview(bytes(BIG)))
    for _ in range(CREDIT_WINDOW // CHUNK_BYTES):
        assembly.accept(next(chunks), view, region)
    with pytest.raises(InvalidInputError, match=f"credit was given for {CREDIT_WINDOW}") as caught:
        assembly.accept(next(chunks), view, region)
    assert (caught.value.limit, caught.value.actual) == (CREDIT_WINDOW, CREDIT_WINDOW + CHUNK_BYTES)


@pytest.mark.parametrize("region", [None, Region(0, 512)])
def test_nothing_is_taken_before_credit_was_given(region: Region | None) -> None:
    assembly = Assembly([item(a=100)])
    with pytest.raises(InvalidInputError, match="credit was given for 0"):
        assembly.accept(ItemChunk(1, 0, 0, 0, memoryview(b"x" * 10)), memoryview(bytearray(1024)), region)


def test_tensors_of_all_items_have_places_of_their_own() -> None:
    assembly = Assembly([item(a=100, b=300), item(a=7)])
    view, region = memory(assembly)
    assembly.grant()
    contents = {(0, 0): b"p" * 100, (0, 1): b"q" * 300, (1, 0): b"r" * 7}
    for (index, tensor), data in reversed(contents.items()):
        assembly.accept(ItemChunk(1, index, tensor, 0, memoryview(data)), view, region)
    slots = assembly.slots(region)
    for (index, tensor), data in contents.items():
        slot = slots[index].tensors[tensor]
        assert slot.arena_offset % 256 == 0
        assert bytes(view[slot.arena_offset : slot.arena_offset + slot.num_bytes]) == data
    assert [slot.name for slot in slots[0].tensors] == ["a", "b"]
