"""Reassembly of one item: what is refused, where the bytes end up, and what its digest depends on."""

from __future__ import annotations

import numpy as np
import pytest

from diptych.service.errors import InvalidInputError
from diptych.wire.framing import CHUNK_BYTES, ItemChunk, split_tensor
from executor_service.front.admission import AdmittedItem
from executor_service.front.arena import Region
from executor_service.front.assembly import ItemAssembly, content_digest
from registry import ItemLayout, MediaInfo, PlaceholderRange, Run, TensorSpec


def item(inline: dict[str, bytes] | None = None, dtype: str = "uint8", **sizes: int) -> AdmittedItem:
    specs = {name: TensorSpec(dtype, (size,)) for name, size in sizes.items()}
    layout = ItemLayout((Run(7, 4),), specs)
    place = PlaceholderRange(2, 4)
    return AdmittedItem(MediaInfo.image(5, 6), place, layout, tuple(specs.items()), inline=inline or {})


def assembly_of(admitted: AdmittedItem) -> tuple[ItemAssembly, memoryview]:
    view = memoryview(bytearray(admitted.region_bytes + 256))
    return ItemAssembly(0, admitted, view, Region(256, admitted.region_bytes)), view


def feed(assembly: ItemAssembly, tensor_index: int, data: bytes) -> None:
    for chunk in split_tensor(1, 0, tensor_index, memoryview(data)):
        assembly.check(chunk)
        assembly.write(chunk)


def test_tensors_have_places_of_their_own() -> None:
    assembly, view = assembly_of(item(a=3 * CHUNK_BYTES + 5, b=300, c=7))
    contents = [np.random.default_rng(n).bytes(size) for n, size in enumerate((3 * CHUNK_BYTES + 5, 300, 7))]
    for index in (2, 0, 1):
        assert not assembly.is_complete
        feed(assembly, index, contents[index])
    assert assembly.is_complete
    for slot, content in zip(assembly.slots(), contents, strict=True):
        assert bytes(view[slot.arena_offset : slot.arena_offset + slot.num_bytes]) == content


def test_inline_tensors_are_there_at_once() -> None:
    assembly, view = assembly_of(item({"b": b"inline!"}, a=10, b=7))
    assert assembly.num_bytes == 10
    feed(assembly, 0, b"0123456789")
    assert assembly.is_complete
    slot = assembly.slots()[1]
    assert bytes(view[slot.arena_offset : slot.arena_offset + 7]) == b"inline!"
    with pytest.raises(InvalidInputError, match="byte 7 is next"):
        assembly.check(ItemChunk(1, 0, 1, 0, memoryview(b"x")))


@pytest.mark.parametrize(
    ("tensor", "offset", "size", "text"),
    [
        (1, 0, 5, "the item has 1 tensors"),
        (0, 0, 0, "a chunk has 0 bytes"),
        (0, 0, CHUNK_BYTES + 1, f"1 to {CHUNK_BYTES}"),
        (0, 5, 5, "byte 0 is next"),
        (0, 0, 101, "reaches to byte 101"),
    ],
)
def test_what_is_not_the_next_chunk_is_refused(tensor: int, offset: int, size: int, text: str) -> None:
    assembly, _ = assembly_of(item(a=100))
    with pytest.raises(InvalidInputError, match=text):
        assembly.check(ItemChunk(1, 0, tensor, offset, memoryview(bytes(size))))


def digest(admitted: AdmittedItem, *contents: bytes) -> bytes:
    assembly, _ = assembly_of(admitted)
    for index, content in enumerate(contents):
        feed(assembly, index, content)
    return assembly.tensors_digest()


def test_the_tensors_digest_tells_names_dtypes_shapes_and_bytes_apart() -> None:
    data = bytes(range(100))
    digests = [
        digest(item(a=100), data),
        digest(item(a=100), data[::-1]),
        digest(item(b=100), data),
        digest(item(dtype="int8", a=100), data),
        digest(item(a=50, b=50), data[:50], data[50:]),
        digest(item(a=51, b=49), data[:51], data[51:]),
    ]
    assert len(set(digests)) == len(digests)
    assert digest(item({"a": data}, a=100)) == digests[0]
    assert digest(item(b=50, a=50), data[50:], data[:50]) == digests[4]


def test_the_content_digest_counts_what_follows_from_the_size() -> None:
    def layout(length: int, **constants: np.ndarray) -> ItemLayout:
        return ItemLayout((Run(7, length),), {}, constants)

    sizes = np.array([[480, 640]])
    digests = [
        content_digest(b"t" * 32, "image", layout(4)),
        content_digest(b"u" * 32, "image", layout(4)),
        content_digest(b"t" * 32, "video", layout(4)),
        content_digest(b"t" * 32, "image", layout(5)),
        content_digest(b"t" * 32, "image", layout(4, image_sizes=sizes)),
        content_digest(b"t" * 32, "image", layout(4, image_sizes=sizes + 1)),
        content_digest(b"t" * 32, "image", layout(4, image_sizes=sizes.astype(np.int32))),
    ]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(dtype: str, value: float) -> None:
    array = np.array([1.0, -2.5, np.finfo(dtype).max, np.finfo(dtype).tiny, 0.0], dtype=dtype)
    good, _ = assembly_of(item(dtype=dtype, a=5))
    feed(good, 0, array.tobytes())
    good.check_values()
    array[3] = value
    bad, view = assembly_of(item(dtype=dtype, a=5))
    feed(bad, 0, array.tobytes())
    with pytest.raises(InvalidInputError, match="item 0: a has values that are not finite") as caught:
        bad.check_values()
    memory = view.obj
    view.release()
    memory.append(0)  # fails as long as anything, such as the error's traceback, has a view of it
    assert caught.value.__traceback__ is not None


@pytest.mark.parametrize(("bits", "is_finite"), [(0x7F80, False), (0xFF80, False), (0x7FC1, False), (0x7F7F, True)])
def test_bfloat16_is_looked_at_too(bits: int, is_finite: bool) -> None:
    assembly, _ = assembly_of(item(dtype="bfloat16", a=2))
    feed(assembly, 0, np.array([0x3F80, bits], dtype="<u2").tobytes())
    if is_finite:
        assembly.check_values()
    else:
        with pytest.raises(InvalidInputError, match="not finite"):
            assembly.check_values()


@pytest.mark.parametrize(("values", "is_right"), [([0, 1, 1, 0], True), ([0, 1, 2, 0], False), ([255, 0, 0, 1], False)])
def test_a_bool_is_0_or_1(values: list[int], is_right: bool) -> None:
    assembly, view = assembly_of(item(dtype="bool", a=4))
    feed(assembly, 0, bytes(values))
    if is_right:
        assembly.check_values()
    else:
        with pytest.raises(InvalidInputError, match="item 0: a has values that are neither 0 nor 1") as caught:
            assembly.check_values()
        assert (caught.value.stage, caught.value.metadata["item"]) == ("receive", "0")
    memory = view.obj
    view.release()
    memory.append(0)  # fails as long as anything has a view of it
