"""Which hooks are the family's own and which are defaults; every later stage builds on this one."""

from __future__ import annotations

from registry.checks.report import Findings
from registry.checks.subject import Subject
from registry.context import read_architecture
from registry.errors import CheckpointError
from registry.hooks import Hooks


def check_checkpoint(subject: Subject, findings: Findings) -> str:
    """The directory can be read, by the family where there is one."""
    architecture = read_architecture(subject.model_dir)
    try:
        ctx = subject.ctx
    except CheckpointError:
        raise
    except Exception:
        return architecture  # what is wrong with the family is the next stage's to say
    return f"{architecture}, {type(ctx.model_config).__name__}, {len(ctx.tokenizer)} tokens"


def check_hooks(subject: Subject, findings: Findings) -> str:
    """A family is registered for the architecture, with every hook it needs and placeholders that exist."""
    family = subject.family
    size = len(family.ctx.tokenizer)
    for modality in family.modalities:
        with findings.calling(f"{modality} placeholder"):
            token_id = family.placeholder_token_id(modality)
            if not 0 <= token_id < size:
                findings.fail(f"{modality} placeholder", "", f"a token id below {size}", token_id)
    return "; ".join([*_listed(family.hooks), *dict.fromkeys(subject.warnings)])


def _listed(hooks: Hooks) -> list[str]:
    per_modality = [
        f"{modality}: {'own' if modality in hooks.layouts else 'no'} layout, "
        f"{_own(hooks.input_mappers.get(modality))} mapper, {_own(hooks.max_tokens.get(modality))} maximum"
        for modality in hooks.modalities
    ]
    return [*per_modality, f"{_own(hooks.dummy_data)} dummy data", f"{_own(hooks.input_processor)} input processor"]


def _own(hook: object) -> str:
    return "default" if hook is None else "own"
