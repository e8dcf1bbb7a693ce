"""How paged_decode_attention cuts its work into units: the kernel's own source, compiled for the host."""

from __future__ import annotations

from pathlib import Path

from tests.executor_service.host_kernels import check_on_host, needs_compiler


@needs_compiler
def test_units_cover_every_token_of_every_head_once(tmp_path: Path) -> None:
    check_on_host(
        tmp_path, "decode_units.cpp", "paged_decode_attention_units.cuh", ("numbers.cuh", "paged_decode_attention.cuh")
    )
