"""Every second of a boot is in a line, whatever begins ahead of its stage is found in it, and weights come in order."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from diptych.service.beginning import process_began
from executor_service.engine.messages import BootProgress
from executor_service.engine.stages import Stages
from executor_service.kernels.cuda import ahead
from executor_service.kernels.cuda.code import KernelLoadError, MachineCode, sources
from executor_service.models import weights
from executor_service.models.weights import WeightReader

STAGES = ["start_process", "import_modules", "load_config", "load_kernels", "load_model", "profile_run",
          "allocate_kv_cache", "capture_graphs", "start_serving"]  # fmt: skip
CPU = torch.device("cpu")


def test_what_passes_between_two_stages_is_the_seconds() -> None:
    ended: list[BootProgress] = []
    began = time.monotonic() - 5
    stages = Stages(lambda progress: ended.append(progress) if progress.seconds is not None else None, began)
    with stages.stage("first") as stage:
        stage.detail, stage.num_bytes = "a detail", 7
    time.sleep(0.05)
    with stages.stage("second"):
        pass
    assert [(one.stage, one.detail, one.num_bytes) for one in ended] == [("first", "a detail", 7), ("second", "", None)]
    assert ended[0].seconds >= 5
    assert ended[1].seconds >= 0.05
    assert sum(one.seconds for one in ended) == pytest.approx(stages.since - began)


def test_a_stage_that_fails_has_no_end() -> None:
    reports: list[BootProgress] = []
    with pytest.raises(ValueError, match="no"), Stages(reports.append).stage("first"):
        raise ValueError("no")
    assert [one.seconds for one in reports] == [None]


def test_the_lines_of_a_boot_add_up_to_its_time(checkpoint: Path) -> None:
    """Counted by whoever gives the command; all but the interpreter's own end of the announcement."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "diptych.cli.main", "executor", "--model", str(checkpoint), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("listening on ")
        seconds = time.monotonic() - began
    finally:
        process.kill()
        log = process.communicate()[1]
    lines = re.findall(r"diptych\.boot: (\w+): ([0-9.]+) s", log)
    assert [name for name, _ in lines] == [*STAGES, "boot"]
    total = float(lines[-1][1])
    assert sum(float(value) for _, value in lines[:-1]) == pytest.approx(total, abs=0.1)
    assert seconds - 2.5 < total < seconds + 0.1


def test_when_a_process_began() -> None:
    code = "import time; from diptych.service.beginning import process_began; print(time.monotonic() - process_began())"
    before = time.monotonic()
    age = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0 <= age <= time.monotonic() - before + 0.02
    assert process_began() < before


def test_machine_code_that_was_begun_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: Future[ahead.Codes] = Future()
    early: Future[MachineCode] = Future()
    monkeypatch.setattr(ahead, "_BEGUN", [begun])
    monkeypatch.setattr(ahead, "machine_code", lambda source, capability: MachineCode(b"late", "compiled"))
    begun.set_result({("silu_mul", (9, 0)): early})
    early.set_result(MachineCode(b"early", "cached"))
    assert ahead.code_of("silu_mul", (9, 0)).cubin == b"early"
    assert ahead.code_of("silu_mul", (8, 0)).cubin == b"late"
    monkeypatch.setattr(ahead, "_BEGUN", [])
    assert ahead.code_of("silu_mul", (9, 0)).cubin == b"late"


def test_every_kernel_is_begun_and_an_error_waits_for_whoever_needs_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    contexts: list[int] = []

    def make(source: str, capability: tuple[int, int]) -> MachineCode:
        if source == "silu_mul":
            raise KernelLoadError("does not compile")
        return MachineCode(source.encode(), "compiled")

    monkeypatch.setattr(ahead, "_BEGUN", [])
    monkeypatch.setattr(ahead, "_first_gpu", lambda: (3, (9, 0)))
    monkeypatch.setattr(ahead, "_make_context", contexts.append)
    monkeypatch.setattr(ahead, "machine_code", make)
    ahead.begin()
    assert {source for source, _ in ahead._BEGUN[0].result(10)} == set(sources())
    assert ahead.code_of("rms_norm", (9, 0)).cubin == b"rms_norm"
    assert contexts == [3]
    with pytest.raises(KernelLoadError, match="does not compile"):
        ahead.code_of("silu_mul", (9, 0))


def test_without_a_gpu_nothing_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gpu() -> tuple[int, tuple[int, int]]:
        raise RuntimeError("no driver")

    monkeypatch.setattr(ahead, "_BEGUN", [])
    monkeypatch.setattr(ahead, "_first_gpu", no_gpu)
    ahead.begin()
    ahead.begin()
    assert len(ahead._BEGUN) == 1
    assert ahead._BEGUN[0].result(10) == {}


@pytest.mark.parametrize(("status", "expected"), [(0, ["retain 3", "current 7", "stacks 256"]), (2, ["retain 3"])])
def test_the_context_has_small_stacks(monkeypatch: pytest.MonkeyPatch, status: int, expected: list[str]) -> None:
    """The limit is the current context's, so the thread that sets it must have it."""
    calls: list[str] = []

    def retain(device: int) -> tuple[SimpleNamespace, int]:
        calls.append(f"retain {device}")
        return SimpleNamespace(value=status), 7

    driver = SimpleNamespace(
        cuDevicePrimaryCtxRetain=retain,
        cuCtxSetCurrent=lambda context: calls.append(f"current {context}"),
        cuCtxSetLimit=lambda limit, size: calls.append(f"{limit} {size}"),
        CUlimit=SimpleNamespace(CU_LIMIT_STACK_SIZE="stacks"),
    )
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=driver))
    ahead._make_context(3)
    assert calls == expected


@pytest.fixture
def many(tmp_path: Path) -> dict[str, torch.Tensor]:
    tensors = {f"layer.{number:03}": torch.full((64 + number,), float(number)) for number in range(100)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tensors


@pytest.mark.parametrize("limit", [0, 1000, 1 << 30])
def test_weights_come_in_order_however_little_may_be_ahead(
    tmp_path: Path, many: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Eight readers; one that is late must never wait for room that those behind it have taken."""
    monkeypatch.setattr(weights, "CPU_AHEAD_BYTES", limit)
    monkeypatch.setattr(weights, "NUM_READERS", {"cpu": 8})
    done: list[tuple[int, int]] = []
    reader, found = WeightReader(tmp_path, CPU), dict[str, torch.Tensor]()

    def take_all() -> None:
        found.update(reader.tensors(lambda *values: done.append(values)))

    thread = threading.Thread(target=take_all, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert found.keys() == many.keys()
    assert all(torch.equal(found[name], many[name]) for name in many)
    assert done[-1][0] == done[-1][1] == (tmp_path / "model.safetensors").stat().st_size


def test_no_more_is_ahead_than_may_be(
    tmp_path: Path, many: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "CPU_AHEAD_BYTES", 1000)
    reader = WeightReader(tmp_path, CPU)
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        time.sleep(0.01)
    assert 1000 <= reader._turns._num_waiting_bytes < 1000 + 4 * 164
    reader.close()


def test_reading_can_be_given_up(
    tmp_path: Path, many: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for the rest: else a boot that has failed would never end."""
    monkeypatch.setattr(weights, "CPU_AHEAD_BYTES", 0)
    reader = WeightReader(tmp_path, CPU)
    assert next(reader.tensors(lambda *_: None))[0] == "layer.000"
    reader.close()
    reader._pool.shutdown(wait=True)
