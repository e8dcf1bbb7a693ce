"""The executor model has the methods and keywords that the runner calls, and takes its weights."""

from __future__ import annotations

import inspect
from typing import Any, Final

from executor_service.checks.trial import Trial, Trials
from executor_service.models.protocol import check_model_class, check_required_keywords, load_model_class
from registry.checks import Findings

CALLS: Final = {
    "get_input_embeddings": (),
    "forward": ("input_ids", "positions", "inputs_embeds"),
    "compute_logits": ("rows",),
}
"""Methods of the protocol with what they are given by position."""


def check_model(trials: Trials, findings: Findings) -> str:
    """The class first; building and loading it only if it fits."""
    detail = ""
    with findings.calling("executor_model"):
        cls: Any = load_model_class(trials.subject.family)
        with findings.calling(cls.__name__):
            check_model_class(cls, trials.tensor_names)
            if trials.subject.family.has_all_layouts:
                check_required_keywords(cls, trials.tensor_names)
            _check_calls(cls, findings)
        if not findings.failures:
            with findings.calling(f"{cls.__name__}.__init__"):
                detail = _describe(trials.trial)
    return detail


def _describe(trial: Trial) -> str:
    count = sum(parameter.numel() for parameter in trial.model.parameters())
    return f"{trial.model_name}: {count:,} parameters, {trial.weights}"


def _check_calls(cls: Any, findings: Findings) -> None:
    for method, names in CALLS.items():
        signature = inspect.signature(getattr(cls, method))
        try:
            signature.bind(None, *names)
        except TypeError as error:
            taken = f"{method}{signature}: {error}"
            findings.fail(f"{cls.__name__}.{method}", "", f"{method}({', '.join(('self', *names))})", taken)
