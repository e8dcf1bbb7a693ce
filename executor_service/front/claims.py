"""What a Start claims of an item's tensors: equal to the layout's, or, without one, within bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from diptych.service.errors import DiptychError, InvalidInputError
from diptych.v1 import tensor_pb2
from diptych.wire.dtypes import DTYPE_OF_NAME, NAME_OF_DTYPE
from registry import ItemLayout, TensorSpec

STAGE: Final = "attest"
MAX_TENSORS: Final = 32
MAX_AXES: Final = 8
MAX_NAME_LENGTH: Final = 128
MAX_ELEMENTS: Final = 1 << 40
MAX_INLINE_BYTES: Final = 64 * 1024
NamedSpecs = tuple[tuple[str, TensorSpec], ...]
"""In the order of the Start."""


def attest_tensors(index: int, messages: Sequence[tensor_pb2.Tensor], layout: ItemLayout) -> NamedSpecs:
    """The layout's specs, if the claims are just those."""
    names = [message.name for message in messages[:MAX_TENSORS]]
    if len(messages) != len(layout.tensors) or sorted(names) != sorted(layout.tensors):
        claimed = ", ".join(name[:MAX_NAME_LENGTH] for name in names) or "none"
        raise _mismatch(index, f"has tensors {claimed}; {', '.join(layout.tensors)} are expected")
    for message in messages:
        _attest_tensor(index, message, layout.tensors[message.name])
    return tuple((name, layout.tensors[name]) for name in names)


def bound_tensors(index: int, messages: Sequence[tensor_pb2.Tensor]) -> NamedSpecs:
    """The claimed specs, where nothing says what they must be: known dtypes, sane shapes, sizes that agree."""
    names = [message.name for message in messages[: MAX_TENSORS + 1]]
    if not 1 <= len(names) <= MAX_TENSORS or len(set(names)) != len(names):
        raise _mismatch(index, f"has {len(messages)} tensors; 1 to {MAX_TENSORS} with names of their own are expected")
    return tuple((message.name, _bound_tensor(index, message)) for message in messages)


def _bound_tensor(index: int, message: tensor_pb2.Tensor) -> TensorSpec:
    if not message.name.isidentifier() or len(message.name) > MAX_NAME_LENGTH:
        raise _mismatch(index, f"has a tensor named {message.name[:MAX_NAME_LENGTH]!r}; a keyword is expected")
    if message.dtype not in NAME_OF_DTYPE:
        raise _mismatch(index, f"claims dtype {message.dtype} for {message.name}, which does not exist")
    shape, elements = tuple(message.shape[: MAX_AXES + 1]), 1
    for extent in shape:
        elements *= extent
        if extent < 1 or elements > MAX_ELEMENTS or len(shape) > MAX_AXES:
            raise _mismatch(
                index, f"claims shape {list(shape)[:MAX_AXES]} for {message.name}; at most {MAX_AXES} axes, each at "
                f"least 1, with {MAX_ELEMENTS} elements in all are allowed",
            )  # fmt: skip
    spec = TensorSpec(NAME_OF_DTYPE[message.dtype], shape)
    _check_payload(index, message, spec)
    return spec


def _attest_tensor(index: int, message: tensor_pb2.Tensor, spec: TensorSpec) -> None:
    if message.dtype != DTYPE_OF_NAME[spec.dtype]:
        claimed = NAME_OF_DTYPE.get(message.dtype, f"dtype {message.dtype}")
        raise _mismatch(index, f"claims {claimed} for {message.name}; it must be {spec.dtype}")
    # Counted and cut before anything walks over it: a message may hold millions of axes.
    if len(message.shape) != len(spec.shape) or tuple(message.shape) != spec.shape:
        claimed = f"shape {message.shape[:MAX_AXES]} of {len(message.shape)} axes"
        raise _mismatch(index, f"claims {claimed} for {message.name}; it must be {list(spec.shape)}")
    _check_payload(index, message, spec)


def _check_payload(index: int, message: tensor_pb2.Tensor, spec: TensorSpec) -> None:
    is_inline = message.WhichOneof("payload") == "data"
    num_bytes = len(message.data) if is_inline else message.chunks.total_bytes
    if num_bytes != spec.num_bytes:
        verb = "has" if is_inline else "announces"
        raise _mismatch(index, f"{verb} {num_bytes} bytes for {message.name}; its shape has {spec.num_bytes}")
    if is_inline and num_bytes > MAX_INLINE_BYTES:
        raise InvalidInputError(
            f"item {index} has {num_bytes} bytes of {message.name} inline; at most {MAX_INLINE_BYTES} are allowed, "
            "larger tensors come in chunks",
            stage=STAGE,
            item=index,
            limit=MAX_INLINE_BYTES,
            actual=num_bytes,
        )


def _mismatch(index: int, what: str) -> DiptychError:
    return InvalidInputError(f"item {index} {what}", stage=STAGE, item=index)
