"""What every GPU test needs: a GPU, or a reason why not."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device: these tests need a GPU, its driver and torch's CUDA build")
    # The references on the CPU are tiny: more threads would only wait for each other.
    torch.set_num_threads(2)
    return torch.device("cuda")
