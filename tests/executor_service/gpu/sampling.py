"""Random sampling requests, and whether a token is what a number of [0, 1) draws from a row in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from executor_service.engine.messages import SamplingParams
from executor_service.engine.request import Request
from executor_service.kernels.logits import Filters, filtered_probabilities
from executor_service.kernels.random_numbers import uniform_numbers
from executor_service.kernels.sample import Integer, Real, SamplingTables, adjust

PROBABILITY_ERROR = 1e-5


def random_request(number: int, vocabulary: int, rng: np.random.Generator) -> Request:
    """Any combination of parameters; half of all requests leave each of them out."""

    def maybe(value: object, neutral: object) -> object:
        return value if rng.random() < 0.5 else neutral

    def ids(most: int) -> list[int]:
        return rng.choice(vocabulary, min(int(rng.integers(1, most + 1)), vocabulary), replace=False).tolist()

    prompt = rng.integers(0, vocabulary + 3, int(rng.integers(1, 400))).tolist()
    output = rng.integers(0, min(vocabulary, 50), int(rng.integers(0, 60))).tolist()
    bias = [(token, float(np.float32(rng.normal() * 5))) for token in ids(40)]
    sampling = SamplingParams(
        max_tokens=1000,
        temperature=maybe(float(rng.uniform(0.3, 3)), 0.0 if rng.random() < 0.5 else 1.0),
        top_p=maybe(float(rng.uniform(0.01, 1)), 1.0),
        top_k=maybe(int(2 ** rng.uniform(0, np.log2(vocabulary) + 1)), 0),
        min_p=maybe(float(rng.uniform(0, 0.3)), 0.0),
        seed=int(rng.integers(0, 2**64, dtype=np.uint64)),
        stop_token_ids=frozenset(ids(3)),
        logprobs=maybe(int(rng.integers(0, 21)), None),
        repetition_penalty=maybe(float(rng.uniform(0.5, 2)), 1.0),
        presence_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        frequency_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        logit_bias=maybe(tuple(bias), ()),
        min_tokens=maybe(int(rng.integers(0, 100)), 0),
        bad_words=maybe(tuple((token,) for token in ids(5)), ()),
    )
    return Request(number, prompt, [], sampling, 100_000, output_token_ids=output)


class Reference:
    """What the float64 formulas make of one row; the tables as they were before the op ran, on the CPU."""

    def __init__(self, logits: Tensor, slot: int, number: int, tables: SamplingTables) -> None:
        self.logits = logits.double()[None]
        slots, numbers = torch.tensor([slot]), torch.tensor([number])
        self.adjusted = adjust(logits[None], slots, numbers, tables)
        integers, reals = tables.integers[slots], tables.reals[slots]
        self.temperature = float(reals[0, Real.TEMPERATURE])
        self.num_logprobs = int(integers[0, Integer.NUM_LOGPROBS])
        self.uniform = uniform_numbers([int(integers[0, Integer.SEED]) % 2**64], [number])[0]
        self._filters = Filters(
            reals[:, Real.TEMPERATURE], reals[:, Real.MIN_P], reals[:, Real.TOP_P], integers[:, Integer.TOP_K]
        )

    def probabilities(self) -> Tensor:
        """What the token is drawn from: float64 [vocabulary]."""
        return filtered_probabilities(self.adjusted, self._filters)[0]

    def check_token(self, token: int) -> None:
        """It is the one drawn, or rounding a probability by no more than the allowed error draws it."""
        best = float(self.adjusted.max())
        if best == -torch.inf:  # every token is banned: any will do
            assert 0 <= token < self.adjusted.shape[-1]
            return
        if not self.temperature:
            assert float(self.adjusted[0, token]) >= best - 1e-6 * max(abs(best), 1.0)
            if best == self.adjusted[0, token]:
                assert token == int(self.adjusted.argmax())
            return
        probabilities = self.probabilities()
        until = float(probabilities[: token + 1].sum())
        before = until - float(probabilities[token])
        assert before - PROBABILITY_ERROR <= self.uniform <= until + PROBABILITY_ERROR, (
            f"token {token} is drawn by [{before}, {until}), not by {self.uniform}"
        )

    def check_logprobs(self, token: int, logprobs: Tensor, top_ids: Tensor) -> None:
        """Values within float32's error, the right number, in falling order and by rising ids among equals."""
        expected = self.logits.log_softmax(-1)[0]
        assert abs(float(logprobs[0] - expected[token])) < PROBABILITY_ERROR
        count = min(self.num_logprobs, self.logits.shape[-1])
        top = top_ids[:count].tolist()
        assert top == (-self.logits[0]).argsort(stable=True)[:count].tolist()
        assert (logprobs[1 : 1 + count] - expected[top]).abs().lt(PROBABILITY_ERROR).all()
