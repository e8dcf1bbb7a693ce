"""Log probabilities are of the model's own distribution: before temperature, top-k and top-p."""

from __future__ import annotations

import pytest
import torch

from tests.executor_service.conftest import Bench, boot_engine


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.5, 5, 0.8), (0.4, 3, 0.9)])
def test_logprobs_of_sampled_tokens_are_plain_log_softmax(
    checkpoint, reference, temperature: float, top_k: int, top_p: float
) -> None:
    bench = Bench(checkpoint, boot_engine(checkpoint), reference)
    request = bench.request(
        1, "Say something", [], temperature=temperature, top_k=top_k, top_p=top_p, seed=7, logprobs=4, max_tokens=16
    )
    reports = bench.reports([request])
    entries = [entry for report in reports for _, entry in report.tokens.logprobs]
    tokens = [token for report in reports for token in report.tokens.token_ids]
    assert [entry.token_id for entry in entries] == tokens
    with torch.inference_mode():
        logits = reference(input_ids=torch.from_numpy(request.token_ids.copy())[None]).logits[0].double()
    rows = logits[request.num_prompt_tokens - 1 : -1].log_softmax(-1)
    assert len(rows) == len(entries) == 16
    assert any(int(row.argmax()) != token for row, token in zip(rows, tokens, strict=True)), "nothing was sampled"
    for row, entry in zip(rows, entries, strict=True):
        values, ids = row.topk(4)
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-6)
        assert [token for token, _ in entry.top] == ids.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-6)
