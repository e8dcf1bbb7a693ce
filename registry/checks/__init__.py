"""`diptych check`, as far as it needs no torch: what a family says of itself, held against what it does."""

from __future__ import annotations

from functools import partial

from registry.checks.hooks import check_checkpoint, check_hooks
from registry.checks.identity import check_fingerprint
from registry.checks.mapper import check_mapper
from registry.checks.maximum import check_dummy_data, check_maximum
from registry.checks.prompt import check_input_processor, check_transformers_processor
from registry.checks.report import Failure, Findings, SkippedStageError, Stage, StageResult, run_stages
from registry.checks.subject import Subject

__all__ = [
    "Failure",
    "Findings",
    "SkippedStageError",
    "Stage",
    "StageResult",
    "Subject",
    "fingerprint_stage",
    "registry_stages",
    "run_stages",
]


def registry_stages(subject: Subject) -> list[Stage]:
    """From the checkpoint to dummy data."""
    return [
        Stage("checkpoint", partial(check_checkpoint, subject)),
        Stage("hooks", partial(check_hooks, subject), ("checkpoint",)),
        Stage("layout and mapper", partial(check_mapper, subject), ("hooks",)),
        Stage("input processor", partial(check_input_processor, subject), ("hooks",)),
        Stage("transformers' processor", partial(check_transformers_processor, subject), ("hooks",)),
        Stage("maximum tokens", partial(check_maximum, subject), ("hooks",)),
        Stage("dummy data", partial(check_dummy_data, subject), ("hooks",), unless_failed=("maximum tokens",)),
    ]


def fingerprint_stage(subject: Subject) -> Stage:
    """The last one."""
    return Stage("fingerprint", partial(check_fingerprint, subject), ("layout and mapper",))
