"""Stages, what they find, and the loop that runs one after another."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

ThingT = TypeVar("ThingT")
Progress = Callable[[str, float], None]
"""Called with a stage's name and how far it is, 0 to 1."""
MAX_FAILURES: Final = 5
"""Failures that a stage reports one by one; of the rest it says how many there are."""


@dataclass(frozen=True)
class Failure:
    """What is wrong: the hook, the item that shows it ("" where none is involved), and both values."""

    hook: str
    item: str
    expected: str
    actual: str

    def __str__(self) -> str:
        where = f"{self.hook}, {self.item}" if self.item else self.hook
        return f"{where}: expected {self.expected}, got {self.actual}"


class SkippedStageError(Exception):
    """A stage cannot say anything here; the message says why."""


@dataclass(frozen=True)
class StageResult:
    """How a stage ended; `detail` says what was looked at, or why nothing was."""

    name: str
    status: Literal["ok", "failed", "skipped"]
    detail: str
    failures: tuple[Failure, ...] = ()


class Findings:
    """What one stage has found so far. `each` reports progress, `calling` turns exceptions into failures."""

    def __init__(self, progress: Callable[[float], None] = lambda fraction: None) -> None:
        self.failures: list[Failure] = []
        self.num_failures = 0
        self._progress = progress

    def fail(self, hook: str, item: object, expected: object, actual: object) -> None:
        """Note a failure; many of one stage are only counted."""
        self.num_failures += 1
        if len(self.failures) < MAX_FAILURES:
            self.failures.append(Failure(hook, str(item), str(expected), str(actual)))

    def expect(self, hook: str, item: object, expected: object, actual: object) -> None:
        """Note a failure unless both values are equal."""
        if expected != actual:
            self.fail(hook, item, expected, actual)

    @contextlib.contextmanager
    def calling(self, hook: str, item: object = "") -> Iterator[None]:
        """Whatever the block raises is a failure of `hook`."""
        try:
            yield
        except SkippedStageError:
            raise
        except Exception as error:
            self.fail(hook, item, "no exception", f"{type(error).__name__}: {error}")

    def each(self, things: Sequence[ThingT], at_least: int = 0, seconds: float | None = None) -> Iterator[ThingT]:
        """All things, or those that `seconds` suffice for, but `at_least` so many."""
        end = None if seconds is None else time.monotonic() + seconds
        for index, thing in enumerate(things):
            if end is not None and index >= at_least and time.monotonic() > end:
                return
            self._progress(index / len(things))
            yield thing


@dataclass(frozen=True)
class Stage:
    """One check. `run` notes failures and returns what it looked at.

    `needs` names stages it builds on; those in `unless_failed` need not have had anything to say.
    """

    name: str
    run: Callable[[Findings], str]
    needs: tuple[str, ...] = ()
    unless_failed: tuple[str, ...] = ()


def run_stages(stages: Sequence[Stage], progress: Progress = lambda name, fraction: None) -> list[StageResult]:
    """Every stage in turn; one whose needs are not ok is skipped."""
    results: dict[str, StageResult] = {}
    for stage in stages:
        progress(stage.name, 0.0)
        blockers = _blockers(stage, results)
        if blockers:
            reason = f"because {blockers[0].name} {'failed' if blockers[0].status == 'failed' else 'was skipped'}"
            results[stage.name] = StageResult(stage.name, "skipped", reason)
        else:
            results[stage.name] = _run(stage, lambda fraction, name=stage.name: progress(name, fraction))  # type: ignore[misc]
        progress(stage.name, 1.0)
    return list(results.values())


def _blockers(stage: Stage, results: Mapping[str, StageResult]) -> list[StageResult]:
    """What keeps the stage from running."""
    not_ok = [results[name] for name in stage.needs if results[name].status != "ok"]
    return not_ok + [results[name] for name in stage.unless_failed if results[name].status == "failed"]


def _run(stage: Stage, progress: Callable[[float], None]) -> StageResult:
    findings = Findings(progress)
    detail = ""
    try:
        with findings.calling(stage.name):
            detail = stage.run(findings)
    except SkippedStageError as reason:
        if not findings.failures:
            return StageResult(stage.name, "skipped", str(reason))
        detail = f"skipped in part: {reason}"
    if findings.num_failures > len(findings.failures):
        detail = f"{detail}; {findings.num_failures} failures, the first {MAX_FAILURES} of them here".lstrip("; ")
    status: Literal["ok", "failed"] = "failed" if findings.failures else "ok"
    return StageResult(stage.name, status, detail, tuple(findings.failures))
