"""Narrow types: over a whole generation our logits are as close to float32 as transformers' own, by every path.

The engine generates greedily and says the 20 likeliest tokens' log probabilities at every step. transformers computes
the same tokens' for the same prompts and answers, in bfloat16 as we do, and in float32 with the same weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from executor_service.engine.messages import TokenLogprobs
from executor_service.engine.request import Request
from tests.checkpoints import make_llava_checkpoint
from tests.executor_service.conftest import Bench
from tests.executor_service.gpu.booting import boot_on_gpu
from tests.executor_service.test_engine_tokens import mixed_requests

pytestmark = pytest.mark.gpu

NUM_REQUESTS, NUM_TOKENS, NUM_LIKELIEST = 10, 40, 20
MOST = 1.2
"""Times transformers' own error."""
CONFIGS = {
    "fused": {"decoder": "fused"},
    "fused without graphs": {"decoder": "fused", "cuda_graphs": False},
    "fused, chunks": {"decoder": "fused", "max_num_batched_tokens": 48},
    "stock": {"decoder": "stock"},
}


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["llama", "mistral"])
def narrow_checkpoint(request: pytest.FixtureRequest, dtype: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights are narrow on disk, so that all three compute with the same."""
    path = tmp_path_factory.mktemp("narrow") / "model"
    return make_llava_checkpoint(path, language=request.param, dtype=getattr(torch, dtype))


@pytest.fixture(scope="module")
def models(narrow_checkpoint: Path, dtype: str) -> tuple[Any, Any]:
    """Transformers' narrow model and float32 one, both on the GPU."""
    return tuple(
        AutoModelForImageTextToText.from_pretrained(narrow_checkpoint, dtype=kind).eval().cuda()
        for kind in (getattr(torch, dtype), torch.float32)
    )


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_errors_are_transformers_own(narrow_checkpoint: Path, dtype: str, models: tuple[Any, Any], config: str) -> None:
    bench = Bench(narrow_checkpoint, boot_on_gpu(narrow_checkpoint, dtype=dtype, **CONFIGS[config]), None)
    requests = mixed_requests(bench, NUM_REQUESTS, max_tokens=NUM_TOKENS, logprobs=NUM_LIKELIEST)
    said = bench.logprobs(requests)
    assert {len(entries) for entries in said.values()} == {NUM_TOKENS}
    ours, theirs = [], []
    for request in requests:
        ids, values = likeliest(said[request.request_id])
        narrow, wide = (teacher_forced(model, request).gather(-1, ids) for model in models)
        ours.append((values - wide).flatten())
        theirs.append((narrow - wide).flatten())
    error, allowed = rms(torch.cat(ours)), rms(torch.cat(theirs))
    print(f"{config}, {dtype}: error {error:.2e}, transformers' own {allowed:.2e}, ratio {error / allowed:.3f}")
    assert 0 < error <= MOST * allowed


def likeliest(entries: list[TokenLogprobs]) -> tuple[Tensor, Tensor]:
    """Token ids [n, NUM_LIKELIEST] and their log probabilities, float64."""
    ids = torch.tensor([[token for token, _ in entry.top] for entry in entries])
    values = torch.tensor([[value for _, value in entry.top] for entry in entries], dtype=torch.float64)
    return ids, values


@torch.inference_mode()
def teacher_forced(model: Any, request: Request) -> Tensor:
    """Log probabilities [n, vocabulary], float64, of what follows every prefix of the answer."""
    ids = torch.from_numpy(request.token_ids[: request.num_tokens].copy())[None].cuda()
    pixels = [item.layout.tensors["pixel_values"].normalization.apply(item.tensors["pixel_values"].numpy())
              for item in request.items]  # fmt: skip
    kwargs = {"pixel_values": torch.from_numpy(np.stack(pixels)).to("cuda", model.dtype)} if pixels else {}
    logits: Tensor = model(input_ids=ids, **kwargs).logits[0]
    return logits.double().log_softmax(-1)[request.num_prompt_tokens - 1 : -1].cpu()


def rms(values: Tensor) -> float:
    """Root of the mean square."""
    return values.pow(2).mean().sqrt().item()


def test_batches_of_other_sizes(narrow_checkpoint: Path, dtype: str) -> None:
    """Greedy tokens alone and among others: equal up to where two tokens are as good as equally likely.

    Other batch sizes add up in another order, so narrow types cannot promise more.
    """
    bench = Bench(narrow_checkpoint, boot_on_gpu(narrow_checkpoint, dtype=dtype), None)
    together = {
        request.request_id: request for request in mixed_requests(bench, NUM_REQUESTS, max_tokens=20, logprobs=2)
    }
    margins = {
        number: [abs(entry.top[0][1] - entry.top[1][1]) for entry in entries]
        for number, entries in bench.logprobs(list(together.values())).items()
    }
    for request in mixed_requests(bench, NUM_REQUESTS, max_tokens=20, logprobs=2):
        bench.logprobs([request])
        other = together[request.request_id]
        differing = np.flatnonzero(request.output_token_ids != other.output_token_ids)
        if len(differing):
            margin = margins[request.request_id][differing[0]]
            print(f"request {request.request_id} differs from token {differing[0]} on, margin {margin:.1e}")
            assert margin < 0.1
