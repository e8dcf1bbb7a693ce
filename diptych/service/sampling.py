"""Which sampling parameters a request may carry; both services check with this one function."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final

from diptych.service.errors import InvalidInputError
from diptych.v1 import tensor_pb2

MAX_STOP_TOKEN_IDS: Final = 64
MAX_LOGPROBS: Final = 20
MAX_LOGIT_BIASES: Final = 1024
MAX_BAD_WORDS: Final = 256
MAX_BAD_WORD_TOKENS: Final = 1024


@dataclass(frozen=True, slots=True)
class _Range:
    """What a number may be; `above`: the lower bound itself is not allowed."""

    low: float
    high: float | None = None
    above: bool = False

    def __contains__(self, value: float) -> bool:
        low_enough = self.high is None or value <= self.high
        # A NaN fails every comparison, so it is in no range.
        return (value > self.low if self.above else value >= self.low) and low_enough

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        return low if self.high is None else f"{low} and at most {self.high:g}"

    def violated_bound(self, value: float) -> float:
        """The bound to name in the error."""
        return self.high if self.high is not None and not value <= self.high else self.low


_RANGES: Final = {
    "max_tokens": _Range(1),
    "temperature": _Range(0, 100),
    "top_p": _Range(0, 1, above=True),
    "min_p": _Range(0, 1),
    "logprobs": _Range(0, MAX_LOGPROBS),
    "prompt_logprobs": _Range(0, MAX_LOGPROBS),
    "repetition_penalty": _Range(0, 100, above=True),
    "presence_penalty": _Range(-2, 2),
    "frequency_penalty": _Range(-2, 2),
}
_BIAS_RANGE: Final = _Range(-100, 100)


def check_sampling(
    params: tensor_pb2.SamplingParams,
    *,
    vocab_size: int | None = None,
    eos_token_ids: Collection[int] = (),
    stage: str = "admit",
) -> None:
    """InvalidInputError for a value out of range.

    `vocab_size`: where it is known, token ids must be below it, and `eos_token_ids`, bad words and stop tokens may not
    rule out every one of them.
    """
    given = {field.name: value for field, value in params.ListFields()}
    for name, value in given.items():
        if (allowed := _RANGES.get(name)) is not None:
            _check_range(name, value, allowed, stage)
    if "max_tokens" in given and params.min_tokens > params.max_tokens:
        raise InvalidInputError(
            f"sampling.min_tokens is {params.min_tokens}; it must be at most max_tokens, which is {params.max_tokens}",
            stage=stage,
            limit=params.max_tokens,
            actual=params.min_tokens,
            field="min_tokens",
        )
    if "stop_token_ids" in given:
        _check_count("stop_token_ids", len(params.stop_token_ids), MAX_STOP_TOKEN_IDS, "ids", stage)
        _check_ids("stop_token_ids", params.stop_token_ids, vocab_size, stage)
    if "logit_bias" in given:
        _check_logit_bias(params, vocab_size, stage)
    if "bad_words" in given:
        _check_bad_words(params, vocab_size, stage)
    if vocab_size is not None and ("bad_words" in given or "min_tokens" in given):
        _check_choice(params, vocab_size, eos_token_ids, stage)


def _check_range(name: str, value: float, allowed: _Range, stage: str, of: str = "") -> None:
    if value not in allowed:
        raise InvalidInputError(
            f"sampling.{name}{of} is {value:g}; it must be {allowed}",
            stage=stage,
            limit=allowed.violated_bound(value),
            actual=value,
            field=name,
        )


def _check_count(name: str, count: int, most: int, what: str, stage: str) -> None:
    if count > most:
        raise InvalidInputError(
            f"sampling.{name} has {count} {what}; at most {most} are allowed",
            stage=stage,
            limit=most,
            actual=count,
            field=name,
        )


def _check_ids(name: str, token_ids: Iterable[int], vocab_size: int | None, stage: str) -> None:
    largest = max(token_ids, default=0)
    if vocab_size is not None and largest >= vocab_size:
        raise InvalidInputError(
            f"sampling.{name} has {largest}; ids are below {vocab_size}",
            stage=stage,
            limit=vocab_size - 1,
            actual=largest,
            field=name,
        )


def _check_logit_bias(params: tensor_pb2.SamplingParams, vocab_size: int | None, stage: str) -> None:
    _check_count("logit_bias", len(params.logit_bias), MAX_LOGIT_BIASES, "ids", stage)
    _check_ids("logit_bias", params.logit_bias, vocab_size, stage)
    for token_id, value in params.logit_bias.items():
        _check_range("logit_bias", value, _BIAS_RANGE, stage, of=f" of token {token_id}")


def _check_bad_words(params: tensor_pb2.SamplingParams, vocab_size: int | None, stage: str) -> None:
    _check_count("bad_words", len(params.bad_words), MAX_BAD_WORDS, "token sequences", stage)
    for index, sequence in enumerate(params.bad_words):
        count = len(sequence.token_ids)
        if not 1 <= count <= MAX_BAD_WORD_TOKENS:
            raise InvalidInputError(
                f"sequence {index} of sampling.bad_words has {count} ids; it must have at least 1 and at most "
                f"{MAX_BAD_WORD_TOKENS}",
                stage=stage,
                limit=MAX_BAD_WORD_TOKENS if count else 1,
                actual=count,
                field="bad_words",
            )
        _check_ids("bad_words", sequence.token_ids, vocab_size, stage)


def _check_choice(
    params: tensor_pb2.SamplingParams, vocab_size: int, eos_token_ids: Collection[int], stage: str
) -> None:
    """Some token is always left, whatever the output is."""
    ruled_out = {sequence.token_ids[-1] for sequence in params.bad_words}
    if params.min_tokens:
        ruled_out.update(params.stop_token_ids, eos_token_ids)
    if len(ruled_out) >= vocab_size:
        raise InvalidInputError(
            f"sampling.bad_words and sampling.min_tokens may rule out all {vocab_size} tokens of the vocabulary",
            stage=stage,
            limit=vocab_size - 1,
            actual=len(ruled_out),
            field="bad_words",
        )
