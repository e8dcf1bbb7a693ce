"""Which sampling parameters a request may carry; both services check with this one function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from diptych.service.errors import InvalidInputError, UnimplementedError
from diptych.v1 import tensor_pb2

MAX_STOP_TOKEN_IDS: Final = 64
MAX_LOGPROBS: Final = 20
UNSERVED_FIELDS: Final = (
    "min_p",
    "prompt_logprobs",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "min_tokens",
    "bad_words",
)
"""Fields of the contract that are not served yet: set, they are UNIMPLEMENTED, never ignored."""


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
    "logprobs": _Range(0, MAX_LOGPROBS),
}


def check_sampling(params: tensor_pb2.SamplingParams, *, vocab_size: int | None = None, stage: str = "admit") -> None:
    """InvalidInputError for a value out of range, UnimplementedError for a field that is not served yet.

    `vocab_size`: where it is known, stop token ids must be below it.
    """
    for field, _ in params.ListFields():
        if field.name in UNSERVED_FIELDS:
            raise UnimplementedError(f"sampling.{field.name} is not served yet", stage=stage, field=field.name)
        if field.name in _RANGES:
            _check_range(field.name, getattr(params, field.name), stage)
    _check_stop_token_ids(params, vocab_size, stage)


def _check_range(name: str, value: float, stage: str) -> None:
    allowed = _RANGES[name]
    if value not in allowed:
        raise InvalidInputError(
            f"sampling.{name} is {value:g}; it must be {allowed}",
            stage=stage,
            limit=allowed.violated_bound(value),
            actual=value,
            field=name,
        )


def _check_stop_token_ids(params: tensor_pb2.SamplingParams, vocab_size: int | None, stage: str) -> None:
    count = len(params.stop_token_ids)
    if count > MAX_STOP_TOKEN_IDS:
        raise InvalidInputError(
            f"sampling.stop_token_ids has {count} ids; at most {MAX_STOP_TOKEN_IDS} are allowed",
            stage=stage,
            limit=MAX_STOP_TOKEN_IDS,
            actual=count,
            field="stop_token_ids",
        )
    largest = max(params.stop_token_ids, default=0)
    if vocab_size is not None and largest >= vocab_size:
        raise InvalidInputError(
            f"sampling.stop_token_ids has {largest}; ids are below {vocab_size}",
            stage=stage,
            limit=vocab_size - 1,
            actual=largest,
            field="stop_token_ids",
        )
