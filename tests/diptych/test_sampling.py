"""The one check of sampling parameters that both services share."""

from __future__ import annotations

import math

import pytest

from diptych.service.errors import InvalidInputError
from diptych.service.sampling import check_sampling
from diptych.v1 import tensor_pb2

Params = tensor_pb2.SamplingParams


def sequence(*token_ids: int) -> tensor_pb2.TokenSequence:
    return tensor_pb2.TokenSequence(token_ids=token_ids)


@pytest.mark.parametrize(
    "params",
    [
        Params(),
        Params(max_tokens=1, temperature=0, top_p=1, top_k=0, logprobs=0, seed=0, ignore_eos=True),
        Params(temperature=100, top_p=1e-6, logprobs=20, top_k=2**32 - 1, stop_token_ids=range(64)),
        Params(min_p=0, prompt_logprobs=0, repetition_penalty=1e-6, presence_penalty=-2, frequency_penalty=2),
        Params(min_p=1, prompt_logprobs=20, repetition_penalty=100, presence_penalty=2, frequency_penalty=-2),
        Params(logit_bias={0: -100, 63: 100}, min_tokens=7, max_tokens=7),
        Params(bad_words=[sequence(63)] * 256, min_tokens=2**32 - 1),
        Params(bad_words=[sequence(*[5] * 1024)]),
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
        ("prompt_logprobs", 21, 20),
        ("min_p", -0.1, 0),
        ("min_p", 1.1, 1),
        ("min_p", math.nan, 1),
        ("repetition_penalty", 0.0, 0),
        ("repetition_penalty", -1.0, 0),
        ("repetition_penalty", 100.5, 100),
        ("repetition_penalty", math.inf, 100),
        ("repetition_penalty", math.nan, 100),
        ("presence_penalty", -2.5, -2),
        ("presence_penalty", 2.5, 2),
        ("presence_penalty", math.nan, 2),
        ("frequency_penalty", -2.5, -2),
        ("frequency_penalty", math.inf, 2),
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


@pytest.mark.parametrize(
    ("params", "text", "limit", "actual"),
    [
        (Params(min_tokens=6, max_tokens=5), "min_tokens is 6; it must be at most max_tokens, which is 5", 5, 6),
        (Params(logit_bias=dict.fromkeys(range(1025), 0)), "logit_bias has 1025 ids; at most 1024", 1024, 1025),
        (Params(logit_bias={2000: 1.0}), "logit_bias has 2000; ids are below 2000", 1999, 2000),
        (Params(logit_bias={7: 100.5}), "logit_bias of token 7 is 100.5; it must be at least -100", 100, 100.5),
        (Params(logit_bias={7: -math.inf}), "logit_bias of token 7 is -inf; it must be at least -100", -100, -math.inf),
        (Params(bad_words=[sequence(1)] * 257), "bad_words has 257 token sequences; at most 256", 256, 257),
        (Params(bad_words=[sequence(1), sequence()]), "sequence 1 of sampling.bad_words has 0 ids", 1, 0),
        (Params(bad_words=[sequence(*[1] * 1025)]), "sequence 0 of sampling.bad_words has 1025 ids", 1024, 1025),
        (Params(bad_words=[sequence(1, 2000)]), "bad_words has 2000; ids are below 2000", 1999, 2000),
    ],
)
def test_lists_have_limits(params: Params, text: str, limit: float, actual: float) -> None:
    with pytest.raises(InvalidInputError) as caught:
        check_sampling(params, vocab_size=2000)
    error = caught.value
    assert text in error.message
    assert (error.stage, error.limit, error.actual) == ("admit", limit, actual)
    assert error.metadata["field"] in text


def test_a_bias_is_a_number() -> None:
    with pytest.raises(InvalidInputError, match="logit_bias of token 3 is nan"):
        check_sampling(Params(logit_bias={3: math.nan}))


def test_some_token_is_left() -> None:
    """Bad words alone, or with the tokens that min_tokens holds back, may not rule out the vocabulary."""
    words = [sequence(1, token) for token in range(8)]
    check_sampling(Params(bad_words=words), vocab_size=9)
    with pytest.raises(InvalidInputError, match="rule out all 8 tokens"):
        check_sampling(Params(bad_words=words), vocab_size=8)
    rest = Params(bad_words=words, stop_token_ids=[8], min_tokens=1)
    check_sampling(rest, vocab_size=10)
    with pytest.raises(InvalidInputError, match="rule out all 10 tokens"):
        check_sampling(rest, vocab_size=10, eos_token_ids=[9])
