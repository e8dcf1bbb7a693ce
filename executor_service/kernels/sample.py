"""Sampling as one op: what each request's parameters make of its row of logits, and the next token drawn from it.

Parameters and token counts are in tables with one row per request, a slot; a step names the slot of each of its rows
and the number of the token that it draws. So everything that changes from step to step is two small tensors.

Log probabilities are of the model's own distribution. Then, in this order: logit bias, penalties, bans; greedy, or
temperature, min-p, top-k, top-p and a draw by inverse transform in token order. The number drawn with depends on seed
and token number alone (`random_numbers.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from functools import cache
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from executor_service.kernels.cuda.module import INT, POINTER, dtype_name, kernel, num_multiprocessors
from executor_service.kernels.library import define_op
from executor_service.kernels.logits import Filters, Penalties, add_bias, ban, draw, filtered_probabilities, penalize
from executor_service.kernels.random_numbers import uniform_numbers

MAX_LOGPROBS: Final = 20
"""Likeliest tokens whose log probabilities a row may ask for."""
MAX_OUTPUT_COUNT: Final = 2**15 - 1
"""A token that has been in the output more often counts as if it had been there so often."""
_THREADS: Final = 1024
_PACK: Final = 4
"""Tokens that one thread looks at together."""
_MAX_WIDTH: Final = 2**19
"""As many as are tested: then integers round off at most 4e-6 of a distribution. The last bin, 32 bits for each lane's
share of the tokens that are hardly likely, has room for 2^21."""
_MAX_LISTED_TOP_K: Final = 128
"""Up to so many are sorted out in a list, as the kernel is compiled."""
_STATIC_SHARED_BYTES: Final = 26 * 1024
"""More than the kernel has besides the row."""
_TYPES: Final = (POINTER,) * 15 + (INT,) * 6


class Real(IntEnum):
    """Columns of `SamplingTables.reals`."""

    TEMPERATURE = 0
    MIN_P = 1
    TOP_P = 2
    REPETITION = 3
    PRESENCE = 4
    FREQUENCY = 5


class Integer(IntEnum):
    """Columns of `SamplingTables.integers`.

    `SEED` is unsigned, in two's complement; `NUM_LOGPROBS` -1 asks for none. The first `NUM_BANS` of `ban_ids` are
    always banned, the next `NUM_HELD_BACK` for tokens whose number is less than `HELD_BACK_UNTIL`.
    """

    SEED = 0
    TOP_K = 1
    NUM_LOGPROBS = 2
    HAS_PENALTIES = 3
    NUM_BIASES = 4
    NUM_BANS = 5
    NUM_HELD_BACK = 6
    HELD_BACK_UNTIL = 7


class SamplingTables(NamedTuple):
    """One row per slot, all on the device of the logits.

    `reals` float64 [S, len(Real)], `integers` int64 [S, len(Integer)]; `bias_ids` int32 and `bias_values` float64, both
    [S, max biases], each id of a row once; `ban_ids` int32 [S, max bans]; `prompt_seen` uint8 [S, words of 8 bits]: bit
    i % 8 of byte i // 8 says whether token i is in the prompt; `output_counts` int16 [S, at least the vocabulary]: how
    often each token is in the output. The op itself adds the tokens that it draws.
    """

    reals: Tensor
    integers: Tensor
    bias_ids: Tensor
    bias_values: Tensor
    ban_ids: Tensor
    prompt_seen: Tensor
    output_counts: Tensor


class Sampled(NamedTuple):
    """`token_ids` int64 [R]; `logprobs` float64 [R, 1 + MAX_LOGPROBS], the drawn token's and then those of `top_ids`.

    `top_ids` int32 [R, MAX_LOGPROBS] are the likeliest tokens, in order. A row that asks for no or fewer log
    probabilities leaves the rest undefined. A row without a slot has token 0.
    """

    token_ids: Tensor
    logprobs: Tensor
    top_ids: Tensor


def sample(
    logits: Tensor, slots: Tensor, numbers: Tensor, tables: SamplingTables, order: Tensor | None = None
) -> Sampled:
    """Logits [R, vocabulary] -> each row's next token.

    `slots` int64 [R], each at most once, -1 for a row that is nobody's; `numbers` int64 [R]: each drawn token's number
    in its request, prompt included. `order` int64 [R], every row once: in which order a GPU is to begin them, for which
    `longest_first` is good; it changes nothing else.
    """
    return Sampled(*SAMPLE(logits, slots, numbers, order, *tables))


def rows_at_once(device: torch.device) -> int | None:
    """How many rows are worked on at the same time; None where their order makes no difference."""
    return num_multiprocessors(device.index) if device.type == "cuda" else None


def cost_of(temperature: float, top_p: float, integers: Mapping[Integer, int]) -> int:
    """About how many thousand cycles the kernel takes for such a row (measured on an H100, 32,064 tokens)."""
    cost = 8
    if integers[Integer.NUM_LOGPROBS] >= 0:
        cost += 12
    if integers[Integer.HAS_PENALTIES] or integers[Integer.NUM_BIASES] or integers[Integer.NUM_BANS]:
        cost += 9
    if temperature <= 0:
        return cost
    top_k, is_cut = integers[Integer.TOP_K], top_p < 1
    if 0 < top_k <= _MAX_LISTED_TOP_K:
        return cost + (20 if is_cut else 16)
    return cost + 8 + (13 if top_k > 0 else 0) + (16 if is_cut else 0)


def longest_first(costs: np.ndarray, at_once: int) -> np.ndarray | None:
    """An order for rows of these costs: then what is left at the end is short, and ends together.

    None where it makes no difference: all rows begin together, or cost the same.
    """
    if len(costs) <= at_once or (costs == costs[0]).all():
        return None
    return np.argsort(-costs, kind="stable")


# --- the reference ------------------------------------------------------------------------------------


def _cpu(
    logits: Tensor, slots: Tensor, numbers: Tensor, order: Tensor | None, *arguments: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    tables = SamplingTables(*arguments)
    result = Sampled(*_fake(logits, slots, numbers, order, *arguments))
    if _are_plain(slots.numpy(), tables):
        result.token_ids.copy_(_likeliest(logits))
        return result
    result.token_ids.zero_()
    rows = (slots >= 0).nonzero().squeeze(-1)
    if len(rows):
        _sample_rows(logits, rows, slots[rows], numbers[rows], tables, result)
    return result


def _are_plain(slots: np.ndarray, tables: SamplingTables) -> bool:
    """Whether all rows are somebody's, greedy, and ask for nothing else."""
    integers, temperatures = tables.integers.numpy()[slots], tables.reals.numpy()[slots, Real.TEMPERATURE]
    return not (
        (slots < 0).any()
        or (temperatures > 0).any()
        or (integers[:, Integer.NUM_LOGPROBS] >= 0).any()
        or integers[:, Integer.HAS_PENALTIES : Integer.HELD_BACK_UNTIL].any()
    )


def _likeliest(logits: Tensor) -> Tensor:
    """Each row's largest logit, the first of several. Numpy finds it in a tenth of the time, of dtypes that it has."""
    if logits.dtype.itemsize < 4:
        return logits.argmax(dim=-1)
    return torch.from_numpy(logits.numpy().argmax(axis=-1))


def _sample_rows(
    logits: Tensor, rows: Tensor, slots: Tensor, numbers: Tensor, tables: SamplingTables, result: Sampled
) -> None:
    """Fill those rows of the result, in float64; rows that ask for nothing pay for nothing."""
    integers, reals = tables.integers[slots], tables.reals[slots]
    tokens = _likeliest(logits[rows])
    held_back = (numbers < integers[:, Integer.HELD_BACK_UNTIL]) & (integers[:, Integer.NUM_HELD_BACK] > 0)
    causes = integers[:, [Integer.HAS_PENALTIES, Integer.NUM_BIASES, Integer.NUM_BANS]]
    changed = (causes.any(dim=-1) | held_back).nonzero().squeeze(-1)
    adjusted: dict[int, Tensor] = {}
    if len(changed):
        values = adjust(logits[rows[changed]], slots[changed], numbers[changed], tables)
        tokens[changed] = values.argmax(dim=-1)
        adjusted = dict(zip(changed.tolist(), values, strict=True))
    drawn = (reals[:, Real.TEMPERATURE] > 0).nonzero().squeeze(-1)
    if len(drawn):
        values = torch.stack([adjusted.get(row, logits[rows[row]]).to(torch.float64) for row in drawn.tolist()])
        tokens[drawn] = _draw(values, integers[drawn], reals[drawn], numbers[drawn])
    penalized = integers[:, Integer.HAS_PENALTIES] > 0
    places = slots[penalized], tokens[penalized]
    tables.output_counts[places] = (tables.output_counts[places] + 1).clamp(min=0, max=MAX_OUTPUT_COUNT)
    result.token_ids[rows] = tokens
    asking = (integers[:, Integer.NUM_LOGPROBS] >= 0).nonzero().squeeze(-1)
    if len(asking):
        _score(logits, rows[asking], tokens[asking], result)


def adjust(logits: Tensor, slots: Tensor, numbers: Tensor, tables: SamplingTables) -> Tensor:
    """What biases, penalties and bans make of rows [R, vocabulary]: float64 [R, vocabulary], new."""
    adjusted = logits.to(torch.float64, copy=True)
    integers = tables.integers[slots]
    rows, columns = _places(integers[:, Integer.NUM_BIASES])
    ids = tables.bias_ids[slots[rows], columns].to(torch.int64)
    add_bias(adjusted, rows, ids, tables.bias_values[slots[rows], columns])
    penalized = integers[:, Integer.HAS_PENALTIES].nonzero().squeeze(-1)
    if len(penalized):
        places, vocabulary = slots[penalized], logits.shape[-1]
        penalties = Penalties(*tables.reals[places][:, [Real.REPETITION, Real.PRESENCE, Real.FREQUENCY]].unbind(-1))
        seen = _unpacked(tables.prompt_seen[places], vocabulary)
        counts = tables.output_counts[places, :vocabulary]
        adjusted[penalized] = penalize(adjusted[penalized], seen, counts, penalties)
    held_back = torch.where(numbers < integers[:, Integer.HELD_BACK_UNTIL], integers[:, Integer.NUM_HELD_BACK], 0)
    rows, columns = _places(integers[:, Integer.NUM_BANS] + held_back)
    ban(adjusted, rows, tables.ban_ids[slots[rows], columns].to(torch.int64))
    return adjusted


def _draw(logits: Tensor, integers: Tensor, reals: Tensor, numbers: Tensor) -> Tensor:
    filters = Filters(
        reals[:, Real.TEMPERATURE], reals[:, Real.MIN_P], reals[:, Real.TOP_P], integers[:, Integer.TOP_K]
    )
    seeds = integers[:, Integer.SEED].numpy().view("uint64")
    uniforms = torch.from_numpy(uniform_numbers(seeds.tolist(), numbers.tolist()))
    return draw(filtered_probabilities(logits, filters), uniforms)


def _score(logits: Tensor, rows: Tensor, tokens: Tensor, result: Sampled) -> None:
    logprobs = logits[rows].to(torch.float64).log_softmax(dim=-1)
    values, ids = logprobs.topk(min(MAX_LOGPROBS, logits.shape[-1]), dim=-1)
    result.logprobs[rows, 0] = logprobs.gather(-1, tokens[:, None]).squeeze(-1)
    result.logprobs[rows, 1 : 1 + values.shape[-1]] = values
    result.top_ids[rows, : ids.shape[-1]] = ids.to(torch.int32)


def _places(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the first `lengths` [R] entries of each row."""
    rows = torch.repeat_interleave(lengths)
    starts = lengths.cumsum(0) - lengths
    return rows, torch.arange(len(rows)) - starts[rows]


def _unpacked(packed: Tensor, vocabulary: int) -> Tensor:
    """Bits of bytes, the lowest first: bool [R, vocabulary]."""
    bits = packed[:, :, None] >> torch.arange(8, dtype=torch.uint8)
    return (bits & 1).to(torch.bool).flatten(1)[:, :vocabulary]


# --- the kernel ---------------------------------------------------------------------------------------


def _cuda(
    logits: Tensor, slots: Tensor, numbers: Tensor, order: Tensor | None, *arguments: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    tables = SamplingTables(*arguments)
    result = _fake(logits, slots, numbers, order, *arguments)
    num_rows, width = logits.shape
    if not num_rows:
        return result
    launch, num_lent = _launcher(logits.dtype, width, logits.get_device())
    counts_width, seen_bytes = tables.output_counts.shape[1], tables.prompt_seen.shape[1]
    if min(counts_width, 8 * seen_bytes) < width or counts_width % _PACK:
        raise ValueError(f"counts of {counts_width} tokens, {8 * seen_bytes} in the prompt, for {width} logits")
    lent = logits.new_empty((num_rows, num_lent), dtype=torch.float32)
    launch(
        (num_rows,), _THREADS, logits.contiguous(), slots, numbers, 0 if order is None else order, *tables, lent,
        *result, width, tables.bias_ids.shape[1], tables.ban_ids.shape[1], seen_bytes, counts_width, MAX_LOGPROBS,
    )  # fmt: skip
    return result


@cache
def _launcher(dtype: torch.dtype, width: int, device: int) -> tuple[Any, int]:
    """The kernel for rows of `width` logits, and how many floats it must be lent for each."""
    if width > _MAX_WIDTH:
        raise ValueError(f"the vocabulary has {width} tokens; the CUDA sampler takes at most {_MAX_WIDTH}")
    padded = -(-width // _PACK) * _PACK
    properties: Any = torch.cuda.get_device_properties(device)
    is_lent = 4 * padded + _STATIC_SHARED_BYTES > properties.shared_memory_per_block_optin
    name = f"sample_{dtype_name(dtype)}_{'lent' if is_lent else 'shared'}"
    shared_bytes = 0 if is_lent else 4 * padded
    return kernel("sample", name, _TYPES, shared_bytes, is_dependent=True), padded if is_lent else 0


def _fake(
    logits: Tensor, slots: Tensor, numbers: Tensor, order: Tensor | None, *tables: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows = logits.shape[0]
    return (
        logits.new_empty(num_rows, dtype=torch.int64),
        logits.new_empty((num_rows, 1 + MAX_LOGPROBS), dtype=torch.float64),
        logits.new_empty((num_rows, MAX_LOGPROBS), dtype=torch.int32),
    )


SAMPLE: Final = define_op(
    "sample(Tensor logits, Tensor slots, Tensor numbers, Tensor? order, Tensor reals, Tensor integers, "
    "Tensor bias_ids, Tensor bias_values, Tensor ban_ids, Tensor prompt_seen, Tensor(a!) output_counts) "
    "-> (Tensor, Tensor, Tensor)",
    cpu=_cpu,
    fake=_fake,
    cuda=_cuda,
)
