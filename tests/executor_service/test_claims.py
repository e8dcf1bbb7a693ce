"""Claims of items that no layout attests, one call at a time; over the wire they are in test_hostile_messages."""

from __future__ import annotations

import pytest

from diptych.service.errors import InvalidInputError
from diptych.v1 import tensor_pb2
from executor_service.front.claims import MAX_TENSORS, bound_tensors


def tensors(count: int) -> list[tensor_pb2.Tensor]:
    return [
        tensor_pb2.Tensor(name=f"t{number}", dtype=tensor_pb2.D_TYPE_INT8, shape=[1], data=b"\0")
        for number in range(count)
    ]


@pytest.mark.parametrize("count", [1, MAX_TENSORS])
def test_a_few_tensors_of_any_kind(count: int) -> None:
    assert [name for name, _ in bound_tensors(0, tensors(count))] == [f"t{number}" for number in range(count)]


@pytest.mark.parametrize("count", [0, MAX_TENSORS + 1, 1000])
def test_none_or_too_many(count: int) -> None:
    with pytest.raises(InvalidInputError, match=f"has {count} tensors; 1 to {MAX_TENSORS} "):
        bound_tensors(0, tensors(count))
