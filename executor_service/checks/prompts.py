"""The prompts of the forward check: text, one item, two items of different sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from executor_service.checks.trial import Trial, Trials
from registry import MediaInfo, MediaItem, PlaceholderRange, ProcessorInputs
from registry.checks.probes import describe, noise_item

NEW_TOKENS: Final = 6
SIDES: Final = (20, 1000)
"""Shortest and longest side of the pictures: large enough to have content, small enough to be quick."""
SEEDS_PER_ITEM: Final = 1000
"""Frames of a video have seeds of their own."""
TEXTS: Final = ("What is this? ", " and then ", " Answer in one word:")


@dataclass(frozen=True)
class Prompt:
    """An expanded prompt and its items."""

    name: str
    token_ids: list[int]
    items: list[MediaItem]
    placeholders: list[PlaceholderRange]


def make_prompts(trials: Trials) -> list[Prompt]:
    """Prompts that fit the model's positions, one of text alone and some for each modality with a layout."""
    trial = trials.trial
    longest = int(getattr(trial.family.ctx.text_config, "max_position_embeddings", 4096)) - NEW_TOKENS
    prompts = [make_prompt(trial, [])]
    for modality in trials.subject.layouts:
        infos = _pick(trials, modality)
        combined = [infos[:1], infos[::-1]] if len(infos) > 1 else [infos]
        prompts += [make_prompt(trial, unlike_items(chosen)) for chosen in combined]
    return [prompt for prompt in prompts if len(prompt.token_ids) <= longest]


def unlike_items(infos: Sequence[MediaInfo], first_seed: int = 0) -> list[MediaItem]:
    """Items none of which has another's content: one that takes another's place shows."""
    return [noise_item(info, first_seed + SEEDS_PER_ITEM * index) for index, info in enumerate(infos)]


def make_prompt(trial: Trial, items: list[MediaItem]) -> Prompt:
    """Text around and between the items."""
    family, tokenizer = trial.family, trial.family.ctx.tokenizer
    ids: list[int] = list(tokenizer(TEXTS[0])["input_ids"])
    for index, item in enumerate(items):
        ids += [family.placeholder_token_id(item.modality)]
        text = TEXTS[1] if index + 1 < len(items) else TEXTS[2]
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
    inputs = family.process(ProcessorInputs(ids, [item.info for item in items]))
    name = " and ".join(describe(item.info) for item in items) or "text alone"
    return Prompt(name, list(inputs.prompt_token_ids), items, list(inputs.placeholders))


def _pick(trials: Trials, modality: str) -> list[MediaInfo]:
    """An item with few tokens, and one that becomes other tensors or, failing that, has another shape."""
    probes = [(info, layout) for info, layout in trials.probes(modality) if _is_ordinary(info)]
    probes = sorted(probes or trials.probes(modality), key=lambda pair: pair[1].length)
    if not probes:
        return []
    first, its_layout = probes[0]
    others = [pair for pair in probes if pair[1].tensors != its_layout.tensors] or probes
    shapes = [info for info, _ in others if (info.height or 0) != (info.width or 0) and info != first]
    return [first, *shapes[:1]]


def _is_ordinary(info: MediaInfo) -> bool:
    if info.modality == "audio":
        return True
    return all(SIDES[0] <= side <= SIDES[1] for side in info.size)
