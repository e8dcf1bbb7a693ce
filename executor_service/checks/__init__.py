"""`diptych check`, as far as it runs the model: protocol, features, and the forward pass against transformers."""

from __future__ import annotations

from functools import partial

from executor_service.checks.features import check_features
from executor_service.checks.forward import check_forward
from executor_service.checks.model import check_model
from executor_service.checks.trial import Trials
from registry.checks import Stage, Subject


def executor_stages(subject: Subject) -> list[Stage]:
    """From the model class to greedy tokens."""
    trials = Trials(subject)
    return [
        Stage("executor model", partial(check_model, trials), ("hooks",)),
        Stage("features", partial(check_features, trials), ("layout and mapper", "executor model")),
        Stage("forward", partial(check_forward, trials), ("features",)),
    ]
