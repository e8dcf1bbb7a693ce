"""Bidirectional spans on a GPU: Gemma 3's own greedy tokens, whatever chunks and caches do."""

from __future__ import annotations

from typing import Any

import pytest

from tests.executor_service.conftest import load_reference
from tests.executor_service.gpu.booting import boot_on_gpu
from tests.executor_service.test_spans import BLOCK, PLUGIN, Gemma3Bench, mixed_requests
from tests.plugins.checkpoints import make_gemma3

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("config", [{}, {"max_num_batched_tokens": 23}, {"async_scheduling": "off"}], ids=str)
def test_tokens_equal_generate(tmp_path, config: dict[str, Any]) -> None:
    checkpoint = make_gemma3(tmp_path / "gemma3")
    booted = boot_on_gpu(checkpoint, plugins=(PLUGIN,), block_size=BLOCK, **config)
    bench = Gemma3Bench(checkpoint, booted, load_reference(checkpoint))
    for _ in range(2):  # the second time from the prefix cache
        requests = mixed_requests(bench)
        outputs = bench.run(requests)
        for request in requests:
            assert outputs[request.request_id] == bench.expected(request)
    assert all(request.num_cached_tokens for request in requests)
