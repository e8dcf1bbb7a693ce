"""What hooks may return: a layout's numbers are checked before anything is counted, made or looked up by them."""

from __future__ import annotations

from typing import Any, Final, TypeVar

from registry.errors import InvalidHookError
from registry.inputs import DummyData
from registry.layout import WIRE_DTYPES, ItemLayout, Run, TensorSpec

ValueT = TypeVar("ValueT")
MAX_ITEM_TOKENS: Final = 1 << 24
"""Tokens of one item at most: far beyond any model's, and a list of so many ids still fits into memory."""

WIRE_IDS: Final = 1 << 32
"""The wire has ids of 32 bits; those of features are looked up nowhere."""


def check_layout(layout: object, where: str, vocab_size: int) -> ItemLayout:
    """The layout itself; InvalidHookError begins with `where` and says what is there and what is expected."""
    checked = expect_type(layout, ItemLayout, where)
    for run in checked.replacement:
        _check_run(run, where, vocab_size)
    if checked.length < 1:
        raise InvalidHookError(f"{where} has an empty replacement")
    if checked.length > MAX_ITEM_TOKENS:
        raise InvalidHookError(f"{where} has {checked.length} tokens; at most {MAX_ITEM_TOKENS} are allowed")
    for name, spec in checked.tensors.items():
        _check_shape(name, spec, where)
    return checked


def check_dummy_data(data: object, where: str) -> DummyData:
    """A plain tuple does as well."""
    pair = expect_type(data, tuple, where)
    if len(pair) != 2:
        raise InvalidHookError(f"{where} returned {len(pair)} values; token ids and items are expected")
    return DummyData(expect_type(pair[0], list, f"{where}, for its token ids,"), list(pair[1]))


def expect_type(value: object, wanted: type[ValueT], where: str) -> ValueT:
    """The value itself, or InvalidHookError that names its type and the one that is expected."""
    if not isinstance(value, wanted):
        article = "an" if wanted.__name__[0] in "AEIOUaeiou" else "a"
        raise InvalidHookError(f"{where} returned {type(value).__name__}; {article} {wanted.__name__} is expected")
    return value


def is_count(value: Any, least: int = 0) -> bool:
    """Whether it is an int, and no bool, of at least so much: what JSON and slices take alike."""
    return type(value) is int and value >= least


def _check_run(run: Run, where: str, vocab_size: int) -> None:
    """Counts can be counted by; what is not a feature is looked up in the embedding."""
    if not is_count(run.count):
        raise InvalidHookError(f"{where} has a run of {run.count!r} tokens; an int of at least 0 is expected")
    bound = WIRE_IDS if run.is_feature else vocab_size
    if not is_count(run.token_id) or run.token_id >= bound:
        raise InvalidHookError(
            f"{where} has token id {run.token_id!r}; an int of at least 0 and below {bound} is expected"
        )


def _check_shape(name: str, spec: TensorSpec, where: str) -> None:
    if spec.dtype not in WIRE_DTYPES:
        raise InvalidHookError(f"{where}: {name} has dtype {spec.dtype!r}; the wire knows {', '.join(WIRE_DTYPES)}")
    if not isinstance(spec.shape, tuple) or not all(is_count(extent, 1) for extent in spec.shape):
        raise InvalidHookError(f"{where}: {name} has shape {spec.shape!r}; a tuple of ints of at least 1 is expected")
