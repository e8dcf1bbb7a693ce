"""What the GPU benchmarks serve, in small on a CPU: checkpoints that load everywhere, a driver that counts right."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from benchmarks.gpu.clients import words
from benchmarks.gpu.floors import ModelWork, Rates
from benchmarks.gpu.load import SIDES, max_model_len
from benchmarks.gpu.models import GEOMETRIES, is_whole, weight_shapes, write_checkpoint
from benchmarks.gpu.workload import Driver, OverTimeError
from tests.executor_service.conftest import Bench

TINY = ["tiny-llava", "tiny-llava-next"]


@pytest.fixture(scope="module", params=TINY)
def geometry(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def checkpoint(geometry: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu-models") / geometry
    num_bytes = write_checkpoint(folder, geometry, "cpu")
    assert num_bytes == sum(4 * shape.numel() for shape in weight_shapes(GEOMETRIES[geometry]()).values())
    return folder


@pytest.fixture(scope="module")
def driver(checkpoint: Path, geometry: str) -> Driver:
    return Driver(
        checkpoint, device="cpu", max_model_len=max_model_len(geometry), max_num_seqs=4, max_num_batched_tokens=256,
        kv_cache_memory=1 << 26, check_integrity=True,
    )  # fmt: skip


def test_a_checkpoint_is_whole_with_an_index_of_its_names(checkpoint: Path, tmp_path: Path) -> None:
    """Names as vLLM takes them, which knows a tower by no other."""
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text("utf-8"))
    assert is_whole(checkpoint)
    beginnings = ("language_model.model.", "language_model.lm_head.", "vision_tower.vision_model.")
    assert all(
        name.startswith((*beginnings, "multi_modal_projector.", "image_newline")) for name in index["weight_map"]
    )
    assert not is_whole(tmp_path)
    index["weight_map"] = {"lm_head.weight": "model-00001-of-00001.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    assert not is_whole(tmp_path)


def test_a_served_prompt_is_as_long_as_one_in_process(driver: Driver) -> None:
    """So that both arms of a comparison do the same work."""
    tokenizer, generator = driver.family.ctx.tokenizer, np.random.default_rng(1)
    for _ in range(20):
        assert len(tokenizer(words(generator, 64))["input_ids"]) == 64


def test_tokens_are_transformers_own(checkpoint: Path, geometry: str, driver: Driver) -> None:
    """Ready tensors of random pixels are what a picture becomes, and the weights mean the same to both."""
    reference = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    bench = Bench(checkpoint, driver.booted, reference)
    requests = driver.requests(3, SIDES[geometry], 6, seed=3)
    outputs = bench.run(requests)
    for request in requests:
        assert outputs[request.request_id] == bench.expected(request)
        assert torch.isfinite(request.items[0].tensors["pixel_values"].float()).all()
    assert len({tuple(tokens) for tokens in outputs.values()}) > 1


def test_a_drive_counts_every_token(driver: Driver, geometry: str) -> None:
    requests = driver.requests(4, SIDES[geometry], 9)
    trace = driver.drive(requests)
    assert {r.request_id: 9 for r in requests} == {n: k for step in trace.steps for n, k in step.num_tokens.items()}
    assert len(trace.token_intervals()) == 4 * 8
    assert 0 < len(trace.decode_intervals(4)) <= 7
    assert sum(trace.decode_intervals(4)) < trace.seconds
    assert set(trace.first_tokens()) == {request.request_id for request in requests}


def test_arrivals_are_waited_for(driver: Driver) -> None:
    requests = driver.requests(3, 0, 2)
    trace = driver.drive(requests, arrivals=[0.0, 0.1, 0.2])
    firsts = trace.first_tokens()
    assert all(firsts[r.request_id] - trace.began >= at for r, at in zip(requests, (0.0, 0.1, 0.2), strict=True))


def test_a_drive_that_takes_too_long_leaves_nothing(driver: Driver) -> None:
    with pytest.raises(OverTimeError, match="requests had tokens after"):
        driver.drive(driver.requests(4, 0, 500), limit=0.01)
    assert driver.engine.load.num_used_blocks == 0
    assert not driver.engine.has_work


def test_floors_of_the_7b_geometry(tmp_path: Path) -> None:
    """Against figures worked out by hand: 6.74e9 parameters of which 0.13e9 are the embedding, 0.5 MiB a token."""
    GEOMETRIES["llava-1.5-7b"]().save_pretrained(tmp_path)
    work, rates = ModelWork(tmp_path), Rates(4.6e12, 4.0e12, 770e12, 680e12)
    assert work.kv_bytes_per_token == 2**19
    assert work.weight_bytes == 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32064)
    one = work.decode(1, 704)
    assert one.num_bytes == work.weight_bytes + 704 * 2**19
    assert one.floors(rates)["short_ms"] == pytest.approx(1000 * one.num_bytes / 4.6e12)
    prefill = work.prefill(256, 640, 1)
    assert prefill.operations / 256 == pytest.approx(8.57e12, rel=0.005)
    assert prefill.floors(rates)["sustained_ms"] == pytest.approx(1000 * prefill.operations / 680e12)
    assert work.prefill(256, 640, 2).operations > prefill.operations


def test_the_floor_has_a_row_of_the_last_layer_and_keys_and_values_of_all(tmp_path: Path) -> None:
    GEOMETRIES["llava-1.5-7b"]().save_pretrained(tmp_path)
    work = ModelWork(tmp_path)
    keys_and_values, layer, head = 2 * 4096**2, 4 * 4096**2 + 3 * 4096 * 11008, 4096 * 32064
    one, two = (work.prefill(1, length, 0).operations for length in (1, 2))
    assert one == 2 * (32 * layer + head) + 2 * 31 * 4096 + 4 * 4096
    assert two - one == 2 * (31 * layer + keys_and_values) + 2 * 31 * 4096 * 3 + 4 * 4096


def test_requests_that_do_not_decode_together_are_named(driver: Driver, geometry: str) -> None:
    """The budget lets one prompt in at a time, so the first ends while others wait."""
    requests = driver.requests(4, SIDES[geometry], 2)
    with pytest.raises(OverTimeError, match="ended before the last decoded"):
        next(driver.decoding(requests))
    assert not driver.engine.has_work
