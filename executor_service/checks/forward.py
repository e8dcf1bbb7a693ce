"""The forward pass: chunked and batched as in one piece, and as transformers' own."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

from executor_service.checks.features import make_item
from executor_service.checks.prompts import Prompt, make_prompt, make_prompts, unlike_items
from executor_service.checks.recorder import Answer, Run
from executor_service.checks.reference import MODALITY_TYPES, decoder_logits, reference_logits
from executor_service.checks.trial import CPU, Trial, Trials, suitable_threads
from executor_service.engine.item_encoder import ItemEncoder
from registry.checks import Findings

CHUNKS: Final = 3
"""Steps that the longest prompt takes when it is chunked."""


def check_forward(trials: Trials, findings: Findings) -> str:
    """Every prompt alone, then all together in chunks, then transformers."""
    trial = trials.trial
    prompts = make_prompts(trials)
    with suitable_threads(trial.model):
        compared = _compare(trial, prompts, findings)
    return f"{len(prompts)} prompts alone and in chunks, {compared}; {trial.weights}"


def _compare(trial: Trial, prompts: list[Prompt], findings: Findings) -> str:
    alone: list[Answer] = []
    for prompt in findings.each(prompts):
        with findings.calling(f"{trial.model_name}.forward", prompt.name):
            alone += Run(trial).answer([prompt])
            _check_width(trial, prompt, alone[-1], findings)
    if not findings.failures:
        _check_chunks(trial, prompts, alone, findings)
    if findings.failures:
        return "not compared with transformers"
    if trial.load_reference is None:
        _check_controls(trial, prompts, alone, findings)
        return "transformers does not know the architecture"
    for prompt, answer in zip(prompts, alone, strict=True):
        _check_reference(trial, prompt, answer, findings)
    dtype = str(trial.dtype).removeprefix("torch.")
    others = sorted({item.modality for prompt in prompts for item in prompt.items} - {"image"})
    return f"against transformers in {dtype}" + (f" ({' and '.join(others)} with our features)" if others else "")


def _check_width(trial: Trial, prompt: Prompt, answer: Answer, findings: Findings) -> None:
    """The sampler, its masks and its counts are as wide as the vocabulary."""
    wanted, found = trial.family.ctx.vocab_size, answer.logits.shape[-1]
    if found != wanted:
        hook = f"{trial.model_name}.compute_logits"
        findings.fail(hook, prompt.name, f"{wanted} logits, as many as ids", f"{found} logits")


def _check_chunks(trial: Trial, prompts: list[Prompt], alone: list[Answer], findings: Findings) -> None:
    budget = max(max(len(prompt.token_ids) for prompt in prompts) // CHUNKS, 2)
    hook = f"{trial.model_name}.forward in chunks of {budget}"
    with findings.calling(hook):
        together = Run(trial, budget).answer(prompts)
        for prompt, one, other in zip(prompts, alone, together, strict=True):
            _agree(trial, hook, prompt, one.logits, other.logits, findings, "as in one piece")
            findings.expect(hook, f"{prompt.name}, greedy tokens", one.token_ids, other.token_ids)


def _check_reference(trial: Trial, prompt: Prompt, answer: Answer, findings: Findings) -> None:
    hook = f"{trial.model_name}.forward"
    with findings.calling(f"{hook} (transformers)", prompt.name):
        answer = _before_items(trial, prompt, answer)
        expected = _expected_logits(trial, prompt, [*prompt.token_ids, *answer.token_ids[:-1]])
        if _agree(trial, hook, prompt, expected, answer.logits, findings, "transformers'"):
            _check_greedy(trial, hook, prompt, answer, expected, findings)


def _before_items(trial: Trial, prompt: Prompt, answer: Answer) -> Answer:
    """The answer as far as transformers can be given it: a token that stands for an item would ask for one more."""
    ids = trial.family.feature_token_ids
    count = next((n for n, token_id in enumerate(answer.token_ids[:-1], 1) if token_id in ids), len(answer.token_ids))
    return Answer(answer.token_ids[:count], answer.logits[: len(prompt.token_ids) - 1 + count])


def _expected_logits(trial: Trial, prompt: Prompt, token_ids: list[int]) -> Tensor:
    """Pictures through transformers' own processor and tower; for other items the features are ours."""
    assert trial.load_reference is not None
    model, types = trial.load_reference(), _modality_types(trial, prompt, len(token_ids))
    if all(item.modality == "image" for item in prompt.items):
        return reference_logits(model, trial.family.ctx, token_ids, types, prompt.items)
    items = [make_item(trial, item, place) for item, place in zip(prompt.items, prompt.placeholders, strict=True)]
    with torch.inference_mode():
        ItemEncoder(trial.model, CPU, trial.dtype).encode(items)
    features = [item.features for item in items if item.features is not None]
    return decoder_logits(model, torch.tensor(token_ids), types, torch.cat(features))


def _modality_types(trial: Trial, prompt: Prompt, length: int) -> Tensor:
    """Which of the first `length` tokens are features, and of what: as transformers' processors mark them."""
    types = torch.zeros(length, dtype=torch.int64)
    for item, place in zip(prompt.items, prompt.placeholders, strict=True):
        is_feature = torch.from_numpy(trial.family.layout(item.info).feature_mask)
        types[place.offset : place.end] = is_feature * MODALITY_TYPES[item.modality]
    return types


def _check_greedy(
    trial: Trial, hook: str, prompt: Prompt, answer: Answer, expected: Tensor, findings: Findings
) -> None:
    """Each token is transformers' choice after the ones before it; equals may be chosen either way."""
    rows = expected[len(prompt.token_ids) - 1 :]
    chosen = rows.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
    if (rows.max(dim=1).values - chosen > trial.tolerance(expected)).any():
        findings.fail(hook, f"{prompt.name}, greedy tokens", rows.argmax(dim=1).tolist(), answer.token_ids)


def _agree(
    trial: Trial, hook: str, prompt: Prompt, expected: Tensor, actual: Tensor, findings: Findings, whose: str
) -> bool:
    """Whether all logits agree; if not, the one that is furthest off is named."""
    if expected.shape != actual.shape:
        findings.fail(hook, prompt.name, f"{whose} logits {list(expected.shape)}", f"logits {list(actual.shape)}")
        return False
    difference = (actual - expected).abs().nan_to_num(nan=float("inf"))
    if difference.max() <= trial.tolerance(expected):
        return True
    row, column = divmod(int(difference.argmax()), difference.shape[1])
    where = f"{prompt.name}, logit {column} of token {row} of {len(prompt.token_ids)}"
    findings.fail(hook, where, f"{whose} {expected[row, column]:.6g}", f"{actual[row, column]:.6g}")
    return False


def _check_controls(trial: Trial, prompts: list[Prompt], alone: list[Answer], findings: Findings) -> None:
    """Without a reference: other features and other positions must change something."""
    for prompt, answer in zip(prompts, alone, strict=True):
        if prompt.items:
            others = unlike_items([item.info for item in prompt.items], first_seed=1)
            changed = Run(trial).answer([make_prompt(trial, others)])[0]
            _expect_change(trial, "other features", prompt, answer, changed, findings)
            _check_positions(trial, prompt, answer, findings)
            return


def _check_positions(trial: Trial, prompt: Prompt, answer: Answer, findings: Findings) -> None:
    if hasattr(trial.model, "positions"):
        return
    backwards = np.arange(len(prompt.token_ids), dtype=np.int64)[::-1]
    changed = Run(trial, positions={0: backwards}).answer([prompt])[0]
    _expect_change(trial, "other positions", prompt, answer, changed, findings)


def _expect_change(
    trial: Trial, what: str, prompt: Prompt, answer: Answer, changed: Answer, findings: Findings
) -> None:
    row = len(prompt.token_ids) - 1
    before, after = answer.logits[row], changed.logits[row]
    if (before - after).abs().max() <= trial.tolerance(before) * 1e-3:
        expected, actual = f"other logits with {what} than {before.max():.6g}", f"{after.max():.6g} again"
        findings.fail(f"{trial.model_name}.forward", f"{prompt.name}, {what}", expected, actual)
