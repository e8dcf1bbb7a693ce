"""Embeddings and features gathered on the CPU: what stands where, token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from executor_service.kernels.embed_merge import embed_merge


@settings(max_examples=30)
@given(st.integers(0, 9), st.integers(0, 4), st.integers(0, 2**16))
def test_every_token_is_where_it_belongs(num_tokens: int, num_items: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(7, 3, generator=generator)
    features = [torch.randn(2, 3, generator=generator) for _ in range(num_items)]
    items = torch.randint(-1, num_items, (num_tokens,), generator=generator) if num_items else -torch.ones(num_tokens)
    places = torch.stack([items, torch.randint(2, (num_tokens,), generator=generator)], dim=1).to(torch.int32)
    # The ids of placeholders may lie outside the table.
    ids = torch.randint(7, (num_tokens,), generator=generator).where(items < 0, 99)
    out = embed_merge(ids, table, features, places)
    assert out.shape == (num_tokens, 3)
    for token, (item, row) in enumerate(places.tolist()):
        assert torch.equal(out[token], table[ids[token]] if item < 0 else features[item][row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    places = torch.tensor([[0, 1], [-1, 0], [1, 0]], dtype=torch.int32)
    features = [torch.randn(2, 6).to(dtype), torch.randn(1, 6).to(dtype)]
    arguments = (torch.tensor([0, 3, 0]), torch.randn(4, 6).to(dtype), features, places)
    torch.library.opcheck(torch.ops.diptych.embed_merge.default, arguments)
