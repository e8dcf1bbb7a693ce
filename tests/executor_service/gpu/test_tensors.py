"""The tests' own tools."""

from __future__ import annotations

import pytest
import torch

from tests.executor_service.gpu.tensors import poison

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("shape", [(1,), (5, 7), (70, 64), (3, 11008), (600, 1000), (1500, 1002)])
def test_new_tensors_are_poisoned(shape: tuple[int, ...]) -> None:
    kept = [torch.zeros(shape, device="cuda") for _ in range(5)]
    del kept[::2]
    poison()
    assert torch.empty(shape, device="cuda").isnan().all()
