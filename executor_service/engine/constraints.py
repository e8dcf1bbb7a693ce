"""What a request's parameters say of single tokens: biases, and which tokens may not come next.

Small lists, prepared once per request on the host; their arithmetic is in `kernels/logits.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from executor_service.engine.messages import SamplingParams

_NONE = np.empty(0, dtype=np.int64)


class TokenConstraints:
    """`bias_token_ids` int64 [N] and `bias_values` float64 [N], and the bans of a request."""

    def __init__(self, sampling: SamplingParams) -> None:
        pairs = sampling.logit_bias
        self.bias_token_ids = np.array([token_id for token_id, _ in pairs], dtype=np.int64)
        self.bias_values = np.array([value for _, value in pairs], dtype=np.float64)
        self._bad_words = BadWords(sampling.bad_words)
        self._min_tokens = sampling.min_tokens
        self._stop_token_ids = np.array(sorted(sampling.stop_token_ids), dtype=np.int64)

    @property
    def has_sequences(self) -> bool:
        """Whether a ban depends on which tokens came before, not on their number alone."""
        return self._bad_words.have_prefixes

    def banned(self, output_token_ids: np.ndarray) -> np.ndarray:
        """Ids that would complete a bad word behind the output so far: int64 [N], with repetitions."""
        return np.concatenate([_NONE, *self._bad_words.completing(output_token_ids)])

    def held_back(self, eos_token_ids: np.ndarray) -> np.ndarray:
        """Ids banned before `min_tokens` output tokens: int64 [N], with repetitions.

        The stop tokens and end-of-text, whether or not the latter would end the answer.
        """
        return np.concatenate([self._stop_token_ids, eos_token_ids]) if self._min_tokens else _NONE


class BadWords:
    """Token sequences that may not appear, by the length of what comes before their last token.

    `have_prefixes`: whether any has more than one token.
    """

    def __init__(self, sequences: Iterable[Sequence[int]]) -> None:
        by_length: dict[int, list[Sequence[int]]] = defaultdict(list)
        for sequence in sequences:
            by_length[len(sequence) - 1].append(sequence)
        self._groups = [
            (length, np.array([sequence[:-1] for sequence in group], dtype=np.int64), _last(group))
            for length, group in by_length.items()
        ]
        # The others may never appear, whatever comes before.
        self.have_prefixes = any(by_length)

    def completing(self, token_ids: np.ndarray) -> list[np.ndarray]:
        """Ids that, put behind `token_ids`, would complete a sequence: some int64 [n]."""
        return [
            lasts[(prefixes == token_ids[len(token_ids) - length :]).all(axis=-1)]
            for length, prefixes, lasts in self._groups
            if length <= len(token_ids)
        ]


def _last(sequences: Sequence[Sequence[int]]) -> np.ndarray:
    return np.array([sequence[-1] for sequence in sequences], dtype=np.int64)
