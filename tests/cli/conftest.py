"""Fixtures of the tests of `diptych check`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from diptych.cli import check
from diptych.cli.main import main
from tests.cli.checking import PINPOINTS, STAGES, Report, make_checkpoint


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("check") / "llava", "LlavaProcessor")


@pytest.fixture(scope="module")
def anyres(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("check") / "llava-next"
    return make_checkpoint(path, "LlavaNextProcessor", pinpoints=PINPOINTS)


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry's stages alone, as where torch is not installed."""
    monkeypatch.setattr(check, "has_torch", lambda: False)


@pytest.fixture
def report_of(capsys: pytest.CaptureFixture[str]) -> Callable[..., Report]:
    def run(model: Path, plugin: str = "") -> Report:
        code = main(["check", "--model", str(model), "--plugin", plugin, "--json"])
        report: Report = json.loads(capsys.readouterr().out)
        assert code == (0 if report["ok"] else 1)
        assert [stage["name"] for stage in report["stages"]] == STAGES
        assert all(("ok" in stage) != ("skipped" in stage) for stage in report["stages"])
        return report

    return run
