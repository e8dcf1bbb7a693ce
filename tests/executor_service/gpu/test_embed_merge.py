"""The CUDA kernel that gathers embeddings and features: copies, so every bit is as in the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from executor_service.kernels.embed_merge import embed_merge
from executor_service.kernels.rms_norm import rms_norm
from tests.executor_service.gpu.tensors import DTYPES, ERRORS, SEEDS, poison, random

pytestmark = pytest.mark.gpu


@settings(max_examples=60)
@given(
    st.sampled_from([0, 1, 3, 70, 1500]), st.sampled_from([1, 7, 8, 64, 1002, 4096]),
    st.sampled_from([0, 1, 3, 64, 65, 150]), DTYPES, SEEDS,
)  # fmt: skip
def test_embed_merge(num_tokens: int, width: int, num_items: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = random((50, width), dtype, seed)
    # Items of one batch are slices of one tensor.
    features = list(random((num_items, 6, width), dtype, seed + 1))
    items = torch.randint(-1, max(num_items, 1), (num_tokens,), generator=generator).clamp(max=num_items - 1)
    places = torch.stack([items, torch.randint(6, (num_tokens,), generator=generator)], dim=1).to(torch.int32)
    ids = torch.randint(50, (num_tokens,), generator=generator).where(items < 0, 1 << 40)
    poison()
    got = embed_merge(ids.cuda(), table, features, places.cuda())
    expected = embed_merge(ids, table.cpu(), [item.cpu() for item in features], places)
    assert torch.equal(got.cpu(), expected)


def test_features_anywhere_and_of_another_dtype() -> None:
    memory = random((4 * 8 + 1,), torch.bfloat16, 0)
    features = [memory[1:].view(4, 8), random((3, 8), torch.float32, 1)]
    table, ids = random((5, 8), torch.bfloat16, 2), torch.tensor([4, 0, 0, 1]).cuda()
    places = torch.tensor([7, -1, 0, 0, 3, 1, 2, -1, 5], dtype=torch.int32).cuda()[1:].view(4, 2)
    expected = torch.stack([table[4], features[0][3], features[1][2].bfloat16(), table[1]])
    poison()
    assert torch.equal(embed_merge(ids, table, features, places), expected)


def test_a_captured_graph_keeps_the_addresses() -> None:
    table, features = random((9, 64), torch.bfloat16, 0), [random((2, 64), torch.bfloat16, 1)]
    ids, places = torch.zeros(2, dtype=torch.int64).cuda(), torch.tensor([[-1, 0], [0, 1]], dtype=torch.int32).cuda()
    embed_merge(ids, table, features, places)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = embed_merge(ids, table, features, places)
    ids.fill_(7)
    features[0].fill_(3)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, torch.stack([table[7], torch.full_like(table[0], 3)]))


def test_features_of_the_kernel_just_before() -> None:
    """It still runs when the places are read, and all that it has written is seen, at every replay."""
    x, weight, table = (random((rows, 4096), torch.bfloat16, rows) for rows in (3000, 1, 9))
    ids = torch.zeros(3001, dtype=torch.int64).cuda()
    places = torch.tensor([[-1, 0], *([0, row] for row in reversed(range(3000)))], dtype=torch.int32).cuda()
    rms_norm(x, weight[0], 1e-5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        features = rms_norm(x, weight[0], 1e-5)
        out = embed_merge(ids, table, [features], places)
    for seed in range(20):
        x.copy_(random((3000, 4096), torch.bfloat16, seed))
        features.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, torch.cat([table[:1], rms_norm(x, weight[0], 1e-5).flip(0)]))


@pytest.mark.parametrize("dtype", list(ERRORS))
def test_opcheck(dtype: torch.dtype) -> None:
    places = torch.tensor([[0, 1], [-1, 0], [1, 0]], dtype=torch.int32).cuda()
    features = [random((2, 6), dtype, 0), random((1, 6), dtype, 1)]
    arguments = (torch.tensor([0, 3, 0]).cuda(), random((4, 6), dtype, 2), features, places)
    torch.library.opcheck(torch.ops.diptych.embed_merge.default, arguments)
