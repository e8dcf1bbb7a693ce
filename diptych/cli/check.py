"""Check a model family on a checkpoint: hooks, layout, mapper, model, and transformers, against each other.

Needs no server. Without torch the stages that run the model are skipped; without weights they run on a
tiny random copy of the configuration. The exit code is 1 if anything is wrong.

examples:
  diptych check --model ./llava-1.5-7b-hf
  diptych check --model ./my-model --plugin my_package.my_model --json
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from diptych.cli.output import print_json

if TYPE_CHECKING:
    from registry.checks import Findings, Stage, StageResult, Subject

EXECUTOR_STAGES: Final = ("executor model", "features", "forward")
MARKS: Final = {"ok": "ok", "failed": "FAILED", "skipped": "skipped"}


def add_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Declare flags."""
    parser.add_argument("--model", required=True, metavar="DIR", help="the checkpoint directory; weights are optional")
    parser.add_argument("--plugin", default="", metavar="MODULE", help="modules with more model families, with commas")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Run every stage, then print them all."""
    from registry.checks import Subject, run_stages

    plugins = [name.strip() for name in arguments.plugin.split(",") if name.strip()]
    subject = Subject(Path(arguments.model), plugins)
    stages = make_stages(subject)
    # What a plugin prints is not part of the report, of which a program may be the reader.
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries' own; the registry's are part of the report
        results = run_stages(stages, _progress(len(stages)))
    if arguments.json:
        print_json(as_json(subject, results))
    else:
        _print_table(subject, results)
    return 0 if is_ok(results) else 1


def make_stages(subject: Subject) -> list[Stage]:
    """The registry's, the executor's if torch is here, and the fingerprint."""
    from registry.checks import Stage, fingerprint_stage, registry_stages

    if has_torch():
        from executor_service.checks import executor_stages

        executor = executor_stages(subject)
    else:
        executor = [Stage(name, _skip_without_torch) for name in EXECUTOR_STAGES]
    return [*registry_stages(subject), *executor, fingerprint_stage(subject)]


def has_torch() -> bool:
    """Whether the model can run here."""
    return find_spec("torch") is not None


def is_ok(results: Sequence[StageResult]) -> bool:
    """Whether nothing failed; what was skipped is not wrong."""
    return all(result.status != "failed" for result in results)


def as_json(subject: Subject, results: Sequence[StageResult]) -> dict[str, object]:
    """The documented JSON form: every stage has either `ok` or `skipped`."""
    return {
        "model": str(subject.model_dir),
        "architecture": subject.architecture,
        "family": subject.family_name,
        "ok": is_ok(results),
        "stages": [_stage_as_json(result) for result in results],
        "fingerprint": None if subject.fingerprint is None else subject.fingerprint.digest.hex(),
    }


def _stage_as_json(result: StageResult) -> dict[str, object]:
    outcome = {"skipped": True} if result.status == "skipped" else {"ok": result.status == "ok"}
    failures = [
        {"hook": failure.hook, "item": failure.item, "expected": failure.expected, "actual": failure.actual}
        for failure in result.failures
    ]
    return {"name": result.name, **outcome, "detail": result.detail, "failures": failures}


def _skip_without_torch(findings: Findings) -> str:
    from registry.checks import SkippedStageError

    raise SkippedStageError("torch is not installed")


def _progress(num_stages: int) -> Callable[[str, float], None]:
    """A bar over all stages on standard error, if that is a terminal."""
    from tqdm import tqdm

    form = "{desc} |{bar}| {percentage:3.0f} %"
    bar = tqdm(total=num_stages, bar_format=form, disable=not sys.stderr.isatty(), leave=False, file=sys.stderr)
    done = 0

    def update(name: str, fraction: float) -> None:
        nonlocal done
        bar.set_description_str(f"{name:<24}", refresh=False)
        bar.n = done + fraction
        bar.refresh()
        if fraction == 1.0:
            done += 1
        if done == num_stages:
            bar.close()

    return update


def _print_table(subject: Subject, results: Sequence[StageResult]) -> None:
    names = max(len(result.name) for result in results)
    indent = " " * (names + 13)
    width = max(shutil.get_terminal_size((100, 24)).columns, names + 40)
    print(f"{subject.model_dir}\n")
    for result in results:
        head = f"  {result.name:<{names}}  {MARKS[result.status]:<7}  "
        print(textwrap.fill(f"{head}{result.detail}", width, subsequent_indent=indent, drop_whitespace=True).rstrip())
        for failure in result.failures:
            print(textwrap.fill(f"{indent}{failure}", width, subsequent_indent=indent))
    failed = [result.name for result in results if result.status == "failed"]
    print(f"\nFAILED: {', '.join(failed)}" if failed else "\nok")
