"""EXIF payloads: the probe reads orientations as Pillow does."""

from __future__ import annotations

import struct
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from preprocess_service.media import header_exif
from preprocess_service.media.headers import HeaderError
from tests.preprocess_service.header_files import (
    ENTRIES,
    Entry,
    app1_exif,
    assert_same,
    directory,
    examples,
    jpeg,
    tiff_header,
)

pytestmark = pytest.mark.usefixtures("small_pixel_limit")


def pillow_orientation(payload: bytes) -> int | None:
    """As `exif_transpose` sees it: 1 for any value that rotates nothing, None for a payload that it refuses."""
    exif_reader = Image.Exif()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exif_reader.load(payload)
        except Exception:
            return None
        value = exif_reader.get(274, 1)
    return next((orientation for orientation in range(2, 9) if orientation == value), 1)


def with_tail(entries: list[Entry], tail: bytes = b"") -> bytes:
    """A payload with values behind its directory, found where `tail_offset` says."""
    return tiff_header() + directory(entries) + tail


def tail_offset(num_entries: int = 1) -> bytes:
    return struct.pack("<L", 8 + 2 + 12 * num_entries + 4)


TURN, LEAVE = struct.pack("<H", 6), struct.pack("<H", 1)
SIX = struct.pack("<LL", 6, 1)
LARGE = struct.pack("<L", 8)
EXIF_CASES: dict[str, tuple[int, bytes]] = {
    "float": (6, with_tail([(274, 11, 1, struct.pack("<f", 6.0))])),
    "fractional float": (1, with_tail([(274, 11, 1, struct.pack("<f", 6.5))])),
    "double": (6, with_tail([(274, 12, 1, tail_offset())], struct.pack("<d", 6.0))),
    "rational": (6, with_tail([(274, 5, 1, tail_offset())], struct.pack("<LL", 12, 2))),
    "fractional rational": (1, with_tail([(274, 5, 1, tail_offset())], struct.pack("<LL", 13, 2))),
    "infinite rational": (1, with_tail([(274, 5, 1, tail_offset())], struct.pack("<LL", 6, 0))),
    "signed rational": (6, with_tail([(274, 10, 1, tail_offset())], struct.pack("<ll", -6, -1))),
    "three shorts": (6, with_tail([(274, 3, 3, tail_offset())], TURN + LEAVE * 2)),
    "64 bits": (6, with_tail([(274, 16, 1, tail_offset())], struct.pack("<Q", 6))),
    "signed byte": (6, with_tail([(274, 6, 1, TURN)])),
    "byte": (1, with_tail([(274, 1, 1, TURN)])),
    "text": (1, with_tail([(274, 2, 2, b"6\0")])),
    "first wins": (6, with_tail([(274, 3, 1, TURN), (274, 3, 1, LEAVE)])),
    "unknown type is passed over": (6, with_tail([(274, 99, 1, LEAVE), (274, 3, 1, TURN)])),
    "no value is passed over": (6, with_tail([(274, 3, 0, LEAVE), (274, 3, 1, TURN)])),
    "value behind the end hides the rest": (1, with_tail([(272, 2, 8, b"\0\1"), (274, 3, 1, TURN)])),
    "value as large as the file is skipped": (6, with_tail([(272, 2, 9999, LARGE), (274, 3, 1, TURN)])),
    "and uses up the budget": (1, with_tail([(272, 2, 9999, LARGE), (274, 5, 1, tail_offset(2))], SIX)),
    "budget just suffices": (6, with_tail([(272, 2, 38, LARGE), (274, 5, 1, tail_offset(2))], SIX)),
    "budget just too small": (1, with_tail([(272, 2, 39, b"\7"), (274, 5, 1, tail_offset(2))], SIX)),
    "cut off behind": (6, with_tail([(274, 3, 1, TURN), (272, 2, 4, b"one")])[:-12]),
    "cut off before": (1, with_tail([(272, 2, 4, b"one"), (274, 3, 1, TURN)])[:-5]),
    "directory behind the end": (1, tiff_header(offset=1000) + directory([(274, 3, 1, TURN)])),
    "only a header": (1, tiff_header()),
}


@pytest.mark.parametrize("case", EXIF_CASES)
def test_odd_exif_directories(case: str) -> None:
    expected, payload = EXIF_CASES[case]
    assert pillow_orientation(payload) == expected
    found = header_exif.orientation_of(payload, None)
    assert (found if found in range(2, 9) else 1) == expected
    assert_same(jpeg(app1_exif(payload)))


NUMBERS = st.lists(st.integers(0, 12), max_size=12)


@examples(700)
@given(ENTRIES, st.sampled_from("<>"), NUMBERS, st.integers(0, 12), st.booleans())
def test_exif_directories(entries: list[Entry], order: str, tail: list[int], offset: int, cut: bool) -> None:
    payload = tiff_header(order, offset if cut else 8) + directory(entries, order)
    payload += struct.pack(f"{order}{len(tail)}L", *tail)
    payload = payload[: len(payload) - offset] if cut else payload
    expected = pillow_orientation(payload)
    if expected is None:
        with pytest.raises(HeaderError):
            header_exif.exif_orientation(payload)
    else:
        found = header_exif.exif_orientation(payload)
        assert (found if found in range(2, 9) else 1) == expected


@examples(500)
@given(
    st.binary(max_size=40), st.sampled_from([b"", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"II\0*", b"Exif\0\0II*\0"])
)
def test_exif_payloads(payload: bytes, start: bytes) -> None:
    expected = pillow_orientation(start + payload)
    try:
        found = header_exif.orientation_of(start + payload, None)
    except HeaderError:
        assert expected is None
    else:
        assert (found if found in range(2, 9) else 1) == expected
