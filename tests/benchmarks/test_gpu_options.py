"""GPU benchmarks on a machine without a GPU."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tools.require_gpu import missing

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    path.stem for path in (ROOT / "benchmarks" / "gpu").glob("*.py") if "make_parser(" in path.read_text("utf-8")
)


def test_all_are_known() -> None:
    assert {"engine", "peers", "served", "boot", "small_linear", "decode_attention"} <= set(SCRIPTS)


@pytest.mark.skipif(not missing(), reason="there is a GPU")
@pytest.mark.parametrize("name", SCRIPTS)
def test_they_say_what_is_missing_and_write_nothing(name: str, tmp_path: Path, capsys) -> None:
    benchmark = importlib.import_module(f"benchmarks.gpu.{name}")
    with pytest.raises(SystemExit) as caught:
        benchmark.main(["--output", str(tmp_path / "results")])
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith("this benchmark needs a GPU, and this is missing:\n- ")
    assert not any(tmp_path.iterdir())
