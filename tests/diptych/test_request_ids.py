"""How long a request's name may be, to both services."""

from __future__ import annotations

import pytest

from diptych.service import request_ids
from diptych.service.errors import LimitExceededError
from diptych.service.request_ids import check_request_id
from executor_service.front import admission
from preprocess_service import pipeline


@pytest.mark.parametrize("letter", ["a", "é", "😀"])
def test_characters_count(letter: str) -> None:
    check_request_id("")
    check_request_id(letter * 128)
    with pytest.raises(LimitExceededError, match="request_id has 129 characters; at most 128 are allowed") as caught:
        check_request_id(letter * 129)
    assert (caught.value.stage, caught.value.limit, caught.value.actual) == ("admit", 128, 129)


def test_the_two_services_have_one_limit() -> None:
    """A name that one takes is no surprise to the other."""
    assert admission.check_request_id is pipeline.check_request_id is request_ids.check_request_id
