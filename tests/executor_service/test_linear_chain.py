"""linear_chain: the op on the CPU, and the order of the kernel's blocks on the host."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from executor_service.kernels.linear_chain import linear_chain
from tests.executor_service.host_kernels import check_on_host, needs_compiler

HIDDEN, ATTENTION, INNER, QKV = 48, 32, 80, 64
EPSILONS = (1e-5, 1e-6)


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, epsilon)


@pytest.mark.parametrize("has_qkv", [False, True])
def test_as_the_steps_of_a_layer(has_qkv: bool) -> None:
    sizes = ((HIDDEN, ATTENTION), (2 * INNER, HIDDEN), (HIDDEN, INNER), (QKV, HIDDEN))
    output, gate_up, down, qkv = (torch.randn(size) for size in sizes)
    mlp_norm, next_norm = torch.randn(HIDDEN), torch.randn(HIDDEN)
    x, residual, bias = torch.randn(5, ATTENTION), torch.randn(5, HIDDEN), torch.randn(QKV)
    middle = residual + x @ output.T
    gate, up = (norm(middle, mlp_norm, EPSILONS[0]) @ gate_up.T).chunk(2, dim=-1)
    expected = middle + (F.silu(gate) * up) @ down.T
    normal = norm(expected, next_norm, EPSILONS[1])
    before = residual.clone()
    last = (qkv, bias) if has_qkv else (None, None)
    out, result = linear_chain(x, residual, output, mlp_norm, gate_up, down, next_norm, EPSILONS, *last)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result, normal @ qkv.T + bias if has_qkv else normal, rtol=1e-4, atol=1e-3)
    assert torch.equal(residual, before)


@needs_compiler
def test_blocks_wait_for_all_that_they_read(tmp_path: Path) -> None:
    headers = ["linear_chain.cuh", "small_linear_product.cuh", "small_linear_tiles.cuh", "ring.cuh"]
    hardware = ["asynchronous.cuh", "small_linear_parts.cuh", "warpgroup.cuh"]
    check_on_host(tmp_path, "linear_chain_order.cpp", headers, hardware)
