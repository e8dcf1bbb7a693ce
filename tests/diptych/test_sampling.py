"""The one check of sampling parameters that both services share."""

from __future__ import annotations

import math

import pytest

from diptych.service.errors import InvalidInputError, UnimplementedError
from diptych.service.sampling import UNSERVED_FIELDS, check_sampling
from diptych.v1 import tensor_pb2

Params = tensor_pb2.SamplingParams


@pytest.mark.parametrize(
    "params",
    [
        Params(),
        Params(max_tokens=1, temperature=0, top_p=1, top_k=0, logprobs=0, seed=0, ignore_eos=True),
        Params(temperature=100, top_p=1e-6, logprobs=20, top_k=2**32 - 1, stop_token_ids=range(64)),
    ],
)
def test_what_is_allowed(params: Params) -> None:
    check_sampling(params, vocab_size=64)


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("max_tokens", 0, 1),
        ("temperature", -0.1, 0),
        ("temperature", 100.5, 100),
        ("temperature", math.nan, 100),
        ("temperature", math.inf, 100),
        ("temperature", -math.inf, 0),
        ("top_p", 0.0, 0),
        ("top_p", 1.5, 1),
        ("top_p", math.nan, 1),
        ("logprobs", 21, 20),
    ],
)
def test_what_is_out_of_range(field: str, value: float, limit: float) -> None:
    with pytest.raises(InvalidInputError) as caught:
        check_sampling(Params(**{field: value}))
    error = caught.value
    assert (error.stage, error.limit, error.metadata["field"]) == ("admit", limit, field)
    assert f"sampling.{field} is " in error.message


def test_stop_token_ids_are_in_the_vocabulary() -> None:
    check_sampling(Params(stop_token_ids=[99]))
    with pytest.raises(InvalidInputError, match="ids are below 99"):
        check_sampling(Params(stop_token_ids=[99]), vocab_size=99)


@pytest.mark.parametrize("field", UNSERVED_FIELDS)
def test_fields_of_later_versions_are_never_ignored(field: str) -> None:
    params = Params()
    if field == "logit_bias":
        params.logit_bias[1] = 0.0
    elif field == "bad_words":
        params.bad_words.add(token_ids=[1])
    else:
        setattr(params, field, 0)
    with pytest.raises(UnimplementedError, match=f"sampling.{field} is not served yet"):
        check_sampling(params)
