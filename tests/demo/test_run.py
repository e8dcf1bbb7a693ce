"""`make demo` as a process: what it prints, the page it writes, and how it ends."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.measuring.index import read_index
from tests.cli.command import descendants, is_alive
from tests.conftest import DEMO_MODEL, ROOT

COMMAND = (sys.executable, "-u", "-m", "demo.run")
TYPES = list(dict.fromkeys(question.type for question in read_index(DEMO_MODEL.parent / "held_out")))


@contextlib.contextmanager
def started(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """The demo as a process; killed if the test fails, so that it hinders no other."""
    command = [*COMMAND, *map(str, arguments)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_every_type_is_asked_and_drawn(tmp_path: Path) -> None:
    page = tmp_path / "folder" / "report.html"
    with started("--output", page) as process:
        printed, _ = process.communicate(timeout=280)
    assert process.returncode == 0, printed
    html = page.read_text("utf-8")
    for name in TYPES:
        assert f"\n{name} · " in printed
        assert f"<h2>{name.capitalize()}</h2>" in html
    assert printed.count("  → ") == len(TYPES) + 1, "the chat has two turns"
    assert "both services have stopped" in printed
    assert page.as_uri() in printed
    assert_self_contained(html)


def assert_self_contained(html: str) -> None:
    """Every picture is in the page, and nothing else is fetched."""
    sources = re.findall(r'<img [^>]*src="([^"]{0,30})', html)
    assert len(sources) > 3 * len(TYPES)
    assert all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"https?://|<script|<link|@import|url\(", html)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    page = tmp_path / "report.html"
    with started("--output", page, "--questions", 12) as process:
        assert process.stdout is not None
        while "→" not in process.stdout.readline():
            assert process.poll() is None
        below = descendants(process.pid)
        assert len(below) >= 2
        process.send_signal(number)
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert printed.rstrip().endswith("stopped")
    assert not page.exists()
    until = time.monotonic() + 20
    while any(map(is_alive, below)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not [pid for pid in below if is_alive(pid)]


def test_another_family_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with started("--model", tmp_path) as process:
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "is no LLaVA-NeXT checkpoint" in printed
