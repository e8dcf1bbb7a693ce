"""The table of cosines and sines holds what transformers computes for each position, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from executor_service.models.fused import rotary_table

FACTORS = [1.0, 1.5, 2.0, 4.0]
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    },
    "longrope": {
        "factor": 4.0, "short_factor": FACTORS, "long_factor": [5.0] * 4, "original_max_position_embeddings": 64,
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", list(ROPES))
def test_rows_are_what_the_module_gives(kind: str, dtype: torch.dtype) -> None:
    config = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **ROPES[kind]},
    )  # fmt: skip
    model = LlamaModel(config).to(dtype)
    table = rotary_table(model)
    # Beyond its original length a longrope turns by the longest request: boot does not let it.
    assert table.shape == (64 if kind == "longrope" else 256, 8)
    assert table.dtype == dtype
    positions = torch.tensor([0, 1, 5, 63, len(table) - 1])
    cos, sin = model.rotary_emb(torch.empty(0, dtype=dtype), positions[None])
    assert torch.equal(table[positions], torch.cat([cos[0, :, :4], sin[0, :, :4]], dim=-1))
    assert torch.equal(cos[0, :, :4], cos[0, :, 4:]), "both halves are alike"
