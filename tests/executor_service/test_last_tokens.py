"""The last decoder layer is computed for the tokens somebody asks about, and makes keys and values of all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from executor_service.layers.context import AttentionMetadata
from executor_service.models.fused import FusedDecoder
from executor_service.models.protocol import takes_requests
from tests.checkpoints import make_llava_checkpoint
from tests.executor_service.conftest import Bench, boot_engine, tokens_of
from tests.executor_service.test_engine_tokens import mixed_requests
from tests.executor_service.test_fused import CHUNKS, run
from tests.plugins.patchwork import PatchworkForImages

ENDS = torch.tensor(CHUNKS).cumsum(0)


@pytest.fixture(params=["llama", "mistral", "qwen2"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    checkpoint = make_llava_checkpoint(tmp_path / "model", language=request.param, sliding_window=7)
    return boot_engine(checkpoint, decoder="fused").engine.runner.model


def count_rows(decoder: FusedDecoder) -> list[list[int]]:
    """By layer, how many rows each pass has for its MLP; counted from now on."""
    rows: list[list[int]] = [[] for _ in decoder._layers]

    def counting(gate_up: Any, seen: list[int]) -> Any:
        def product(x: Tensor) -> Tensor:
            seen.append(len(x))
            return gate_up(x)

        return product

    decoder._layers = [
        replace(layer, gate_up=counting(layer.gate_up, seen)) for layer, seen in zip(decoder._layers, rows, strict=True)
    ]
    return rows


@pytest.mark.parametrize("asked", [[0], [1], [2], [0, 2], [0, 1, 2], []], ids=str)
def test_the_same_states_keys_and_values(model: Any, asked: list[int]) -> None:
    everything, caches = run(model, 0)
    rows = count_rows(model.fused_decoder)
    asked_about, few_caches = run(model, 0, torch.tensor(asked, dtype=torch.int64))
    torch.testing.assert_close(asked_about, everything[ENDS[asked] - 1], atol=1e-12, rtol=1e-12)
    for few, all_of_them in zip(few_caches, caches, strict=True):
        torch.testing.assert_close(few.keys, all_of_them.keys, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(few.values, all_of_them.values, atol=1e-12, rtol=1e-12)
    assert rows == [[sum(CHUNKS)], [len(asked)]]


def test_the_stock_decoder_gives_the_same_rows(model: Any) -> None:
    model.fused_decoder = None
    asked = torch.tensor([0, 2])
    assert torch.equal(run(model, 0, asked)[0], run(model, 0)[0][ENDS[asked] - 1])


def test_a_batch_of_last_tokens() -> None:
    batch = AttentionMetadata(
        slot_mapping=torch.tensor([7, 20, 21, 22, 40, 41]), cu_seqlens=torch.tensor([0, 1, 4, 6], dtype=torch.int32),
        seq_lens=torch.tensor([8, 3, 12], dtype=torch.int32), block_tables=torch.tensor([[1], [5], [9]]),
        num_decodes=1, max_query_len=3, visible_ends=torch.tensor([8, 3, 3, 3, 11, 12]),
    )  # fmt: skip
    last = batch.of_last_tokens(torch.tensor([0, 2]))
    assert batch.last_rows(torch.tensor([0, 2])).tolist() == [0, 5]
    assert (last.slot_mapping.tolist(), last.cu_seqlens.tolist()) == ([7, 41], [0, 1, 2])
    assert (last.seq_lens.tolist(), last.block_tables.tolist()) == ([8, 12], [[1], [9]])
    assert (last.num_decodes, last.max_query_len, last.visible_ends) == (2, 1, None)


@pytest.mark.parametrize("budget", [7, 33, 512])
def test_the_last_layer_has_a_row_per_sampled_token(checkpoint: Path, reference: Any, budget: int) -> None:
    """None in a step without one; tokens are transformers' own."""
    bench = Bench(checkpoint, boot_engine(checkpoint, decoder="fused", max_num_batched_tokens=budget), reference)
    rows = count_rows(bench.engine.runner.model.fused_decoder)
    requests = mixed_requests(bench, 6)
    tokens = tokens_of(reports := bench.reports(requests))
    for request in requests:
        assert tokens[request.request_id] == bench.expected(request)
    first, last = rows
    assert last == [len(report.tokens.token_ids) for report in reports]
    assert sum(first) == sum(request.num_computed_tokens for request in requests) > 2 * sum(last)
    assert (0 in last) == (budget == 7)


@pytest.mark.parametrize("scores", [False, True])
def test_rows_are_padded_to_what_graphs_are_for(
    checkpoint: Path, reference: Any, monkeypatch: pytest.MonkeyPatch, scores: bool
) -> None:
    """Rows of nothing change no token, and there is one for every row that was sampled."""
    bench = Bench(checkpoint, boot_engine(checkpoint, decoder="fused"), reference)
    runner = bench.engine.runner
    real, sizes = runner._padded, []

    def padded(requests: np.ndarray, num_tokens: int) -> np.ndarray:
        runner.graphs = SimpleNamespace(size_for=lambda count: next(size for size in (1, 2, 8) if size >= count))
        result = real(requests, num_tokens)
        runner.graphs = None  # there are none on a CPU
        sizes.append((len(requests), len(result), num_tokens))
        assert result.tolist() == [*requests, *[requests[-1]] * (len(result) - len(requests))]
        return result

    monkeypatch.setattr(runner, "_padded", padded)
    requests = mixed_requests(bench, 5)
    scored = [bench.request(9, "Say it", [], prompt_logprobs=1)] if scores else []
    tokens = tokens_of(bench.reports([*requests, *scored]))
    for request in (*requests, *scored):
        assert tokens[request.request_id] == bench.expected(request)
    count = 5 + scores
    assert sizes[0][:2] == (count, 8)
    assert (count, count, count) in sizes, "a step that only decodes has no more rows than tokens"


def test_prompts_that_are_scored_need_all_rows(checkpoint: Path, reference: Any) -> None:
    bench = Bench(checkpoint, boot_engine(checkpoint, decoder="fused"), reference)
    first, last = count_rows(bench.engine.runner.model.fused_decoder)
    bench.reports([*mixed_requests(bench, 2), bench.request(9, "Say it", [], prompt_logprobs=1)])
    assert first[0] == last[0] > 3
    assert first == last, "what follows only decodes"


def test_who_is_asked_about_is_told_to_models_that_want_to_know(model: Any) -> None:
    assert takes_requests(model)
    assert not takes_requests(PatchworkForImages)
