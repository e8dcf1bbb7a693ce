"""A request inside the engine."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from executor_service.engine.constraints import TokenConstraints
from executor_service.engine.messages import FinishReason, SamplingParams
from registry import ItemLayout, PlaceholderRange

Span = tuple[int, int]
"""Begin and end of tokens that see each other."""


@dataclass(eq=False)
class EncodedItem:
    """What the encoder makes of a content, and how many items have it pinned; see EncoderCache."""

    num_features: int = 0
    features: Tensor | None = None
    num_users: int = 0


@dataclass
class EngineItem:
    """One media item: where its features go, and its tensors by keyword (views into shared memory).

    `content_digest` says all that its features depend on; None: they are shared with nobody. `is_attested` is
    False where the family has no layout: then `layout` is only what the sender claimed.
    """

    placeholder: PlaceholderRange
    modality: str
    layout: ItemLayout
    tensors: dict[str, Tensor]
    is_attested: bool = True
    content_digest: bytes | None = None
    encoded: EncodedItem = field(default_factory=EncodedItem)

    @property
    def features(self) -> Tensor | None:
        """[num_features, width] from the item's encoding until its range is computed."""
        return self.encoded.features

    @features.setter
    def features(self, features: Tensor) -> None:
        self.encoded.features = features


class Request:
    """Tokens, progress and blocks of one request.

    Invariant: keys and values of the first `num_computed_tokens` tokens are in the blocks of `block_table`.
    `items` are in the prompt's order; no token from `items_end` on belongs to one. `spans` (see `spans.py`) are
    computed as a whole: `num_computed_tokens` is in one only where the blocks before it came from the prefix cache.
    `output_token_ids` were given to the client before, by another executor: generation goes on behind them.
    `num_inflight_tokens` more are sampled, but so far known to the device alone.
    """

    def __init__(
        self,
        request_id: int,
        prompt_token_ids: Any,
        items: list[EngineItem],
        sampling: SamplingParams,
        max_model_len: int,
        priority: int = 0,
        positions: np.ndarray | None = None,
        decode_delta: int = 0,
        output_token_ids: Sequence[int] = (),
    ) -> None:
        self.request_id = request_id
        self.items = items
        self.items_end = items[-1].placeholder.end if items else 0
        self.spans: Sequence[Span] = ()
        self.sampling = sampling
        self.priority = priority
        self.num_prompt_tokens = len(prompt_token_ids)
        self.max_tokens = min(self.num_prompt_tokens + sampling.max_tokens, max_model_len)
        self.token_ids = np.empty(self.max_tokens, dtype=np.int64)
        self.token_ids[: self.num_prompt_tokens] = prompt_token_ids
        self.num_tokens = self.num_prompt_tokens + len(output_token_ids)
        self.token_ids[self.num_prompt_tokens : self.num_tokens] = output_token_ids
        self.num_inflight_tokens = 0
        # Where the device has the last of those: a row of what the step before has sampled.
        self.sampled_row = 0
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.block_table = array("q")
        self.block_digests: list[bytes] = []
        self.num_registered_blocks = 0
        self._prompt_positions = positions
        self._decode_delta = decode_delta
        self.constraints = TokenConstraints(sampling)
        # The first token has no log probability: nothing comes before it.
        self.num_scored_tokens = 1
        self.finish_reason: FinishReason | None = None
        self.error = ""
        self.arrived = time.monotonic()
        self.first_scheduled: float | None = None
        self.first_token: float | None = None
        self.encode_began: float | None = None
        self.encode_ended: float | None = None

    @property
    def is_shareable(self) -> bool:
        """Whether others may share what it computes: all its items have a content digest."""
        return all(item.content_digest is not None for item in self.items)

    @property
    def shares_prefix(self) -> bool:
        """Whether it may use what others have computed: not where every prompt token's logits are asked for."""
        return self.is_shareable and not self.scores_prompt

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> np.ndarray:
        """Tokens generated so far: int64 [n], a view."""
        return self.token_ids[self.num_prompt_tokens : self.num_tokens]

    @property
    def num_expected_tokens(self) -> int:
        """Tokens once those in flight have arrived: the number of the one that is sampled next."""
        return self.num_tokens + self.num_inflight_tokens

    @property
    def needs_output_on_host(self) -> bool:
        """Whether the next token depends on values of output tokens that only the host looks at: on bad words."""
        return self.constraints.has_sequences

    @property
    def scores_prompt(self) -> bool:
        """Whether log probabilities of prompt tokens are still to be given; `num_scored_tokens` are done."""
        return self.sampling.prompt_logprobs is not None and self.num_scored_tokens < self.num_prompt_tokens

    @property
    def num_pending_tokens(self) -> int:
        """Tokens whose keys and values are not in the cache; at least 1 while the request runs."""
        return self.num_tokens + self.num_inflight_tokens - self.num_computed_tokens

    @property
    def awaits_tokens(self) -> bool:
        """Whether it cannot go on before the tokens in flight are known: they may be its last, or decide the next."""
        return self.num_inflight_tokens > 0 and (
            self.num_expected_tokens >= self.max_tokens or self.needs_output_on_host
        )

    @property
    def is_finished(self) -> bool:
        """Whether the request has ended."""
        return self.finish_reason is not None

    @property
    def counts_positions(self) -> bool:
        """Whether the position of token n is n."""
        return self._prompt_positions is None and not self._decode_delta

    def positions(self, start: int, end: int) -> np.ndarray:
        """Positions of tokens `start` to `end`: int64 [n], or [axes, n] where the model has several axes.

        Those of the prompt are the model's own if it gave any; output token n is at n + `decode_delta`.
        """
        counted = np.arange(start, end, dtype=np.int64) + self._decode_delta
        if self._prompt_positions is None:
            return counted
        given = self._prompt_positions[..., start : min(end, self.num_prompt_tokens)]
        rest = counted[given.shape[-1] :]
        return np.concatenate([given, np.broadcast_to(rest, (*given.shape[:-1], len(rest)))], axis=-1)

    def items_between(self, start: int, end: int) -> Sequence[EngineItem]:
        """Items whose range overlaps tokens `start` to `end`."""
        if start >= self.items_end:
            return ()
        return [item for item in self.items if item.placeholder.offset < end and item.placeholder.end > start]

    def spans_between(self, start: int, end: int) -> Sequence[Span]:
        """Spans that overlap tokens `start` to `end`."""
        if not self.spans or start >= self.items_end:
            return ()
        return [(first, last) for first, last in self.spans if first < end and last > start]

    def without_cut(self, num_tokens: int) -> int:
        """How many of the next `num_tokens` tokens a step may compute, so that it ends in no span."""
        start = self.num_computed_tokens
        end = start + num_tokens
        cut = next((first for first, last in self.spans_between(start, end) if last > end), end)
        return max(cut - start, 0)

    def append(self, token_id: int, eos_token_ids: frozenset[int]) -> None:
        """Add an output token, and finish if it ends the answer."""
        if self.first_token is None:
            self.first_token = time.monotonic()
        self.token_ids[self.num_tokens] = token_id
        self.num_tokens += 1
        self.num_inflight_tokens = max(self.num_inflight_tokens - 1, 0)
        sampling = self.sampling
        is_eos = token_id in eos_token_ids and not sampling.ignore_eos
        if is_eos or token_id in sampling.stop_token_ids:
            self.finish_reason = FinishReason.STOP
        elif self.num_tokens >= self.max_tokens:
            self.finish_reason = FinishReason.LENGTH

    def reset_progress(self) -> None:
        """Forget what was computed: everything is recomputed after a preemption."""
        self.num_computed_tokens = 0
        self.num_preemptions += 1
