"""What `make sanitize` makes of a tool's output; the tools themselves need a GPU."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parents[2] / "tools"

CLEAN = """========= COMPUTE-SANITIZER
op silu_mul, quick_gelu
op sample
op -
========= ERROR SUMMARY: 0 errors
"""
RACE = """========= COMPUTE-SANITIZER
op silu_mul, quick_gelu
op sample
========= Error: Race reported between Write access at sample_bfloat16_shared+0x10 in sample.cu
=========     and Read access at sample_bfloat16_shared+0x20 in sample.cu [32 hazards]
=========
op -
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


@pytest.fixture
def sanitize(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    import sanitize

    return sanitize


def test_clean(sanitize: ModuleType) -> None:
    outcome = sanitize.Outcome("memcheck", CLEAN, 0, 3.2)
    assert outcome.is_clean
    assert outcome.reports == {"silu_mul, quick_gelu": 0, "sample": 0, "-": 0}
    assert str(outcome) == "memcheck     clean, 3 s. ERROR SUMMARY: 0 errors"


@pytest.mark.parametrize("code", [0, 9])
def test_a_report_counts_whatever_the_exit_code_says(sanitize: ModuleType, code: int, capsys) -> None:
    outcome = sanitize.Outcome("racecheck", RACE, code, 1.0)
    assert not outcome.is_clean
    assert outcome.reports["sample"] == 1
    sanitize.show([sanitize.Outcome("memcheck", CLEAN, 0, 3.2), outcome])
    printed = capsys.readouterr().out
    assert "Race reported between Write access at sample_bfloat16_shared" in printed
    assert [line.split() for line in printed.splitlines() if line.startswith("sample ")] == [
        ["sample", "memcheck", "clean,", "racecheck", "1"]
    ]


@pytest.mark.parametrize(("log", "code"), [
    (CLEAN, 1), (CLEAN, None), (CLEAN.replace("op -\n", ""), 0), ("", 0),
])  # fmt: skip
def test_launches_that_do_not_come_to_their_end(sanitize: ModuleType, log: str, code: int | None) -> None:
    assert not sanitize.Outcome("memcheck", log, code, 1.0).is_clean
