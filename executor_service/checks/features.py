"""The encoder makes exactly as many features as the layout says."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from executor_service.checks.prompts import unlike_items
from executor_service.checks.trial import CPU, Trial, Trials, suitable_threads
from executor_service.engine.item_encoder import ItemEncoder
from executor_service.engine.request import EngineItem
from registry import MediaItem, PlaceholderRange
from registry.checks import Findings, SkippedStageError
from registry.checks.probes import describe, noise_item, representatives

MAX_ITEMS: Final = 32
AT_LEAST: Final = 8
SECONDS: Final = 10.0
"""Encoding ends after so many items, or after so many seconds and at least so many items."""
BLOCK_SIZE: Final = 16


@torch.inference_mode()
def check_features(trials: Trials, findings: Findings) -> str:
    """One item at a time, the telling sizes first."""
    if not trials.subject.layouts:
        raise SkippedStageError("there is no layout to compare with")
    details = []
    for modality in trials.subject.layouts:
        count = 0
        for info in findings.each(representatives(trials.probes(modality))[:MAX_ITEMS], AT_LEAST, SECONDS):
            with suitable_threads(trials.trial.model):
                _check_item(trials.trial, noise_item(info), findings)
            count += 1
        if not findings.failures:
            _check_order(trials, modality, findings)
        details.append(f"{modality}: {count} items encoded")
    return f"{'; '.join(details)}, {trials.trial.weights}"


def make_item(trial: Trial, media: MediaItem, placeholder: PlaceholderRange) -> EngineItem:
    """An item as the engine gets it, mapped by the family."""
    tensors = {name: torch.from_numpy(array) for name, array in trial.family.map_item(media).items()}
    return EngineItem(placeholder, media.modality, trial.family.layout(media.info), tensors)


def _check_item(trial: Trial, media: MediaItem, findings: Findings) -> None:
    hook = f"{trial.model_name}.embed_multimodal"
    with findings.calling(hook, describe(media.info)):
        item = make_item(trial, media, PlaceholderRange(0, trial.family.layout(media.info).length))
        encoder: Any = _Encoder(trial.model)
        try:
            ItemEncoder(encoder, CPU, trial.dtype).encode([item])
        except ValueError:
            wanted = [[item.layout.num_tokens, encoder.get_input_embeddings().weight.shape[-1]]]
            if encoder.shapes in ([], wanted):
                raise
            findings.fail(hook, describe(media.info), f"features of shapes {wanted}", f"features of {encoder.shapes}")


def _check_order(trials: Trials, modality: str, findings: Findings) -> None:
    """Two items that only their content tells apart have the same features together as alone."""
    info = representatives(trials.probes(modality))[:2][-1]
    hook, item = f"{trials.trial.model_name}.embed_multimodal", f"two of {describe(info)}"
    with findings.calling(hook, item), suitable_threads(trials.trial.model):
        first, second = unlike_items([info, info])
        alone = [*_encode(trials.trial, [first]), *_encode(trials.trial, [second])]
        together = _encode(trials.trial, [first, second])
        if not _agree(trials.trial, alone, together):
            actual = "each other's" if _agree(trials.trial, alone[::-1], together) else "others"
            findings.fail(hook, item, "the features that each has alone", actual)


def _encode(trial: Trial, media: list[MediaItem]) -> list[Tensor]:
    """Features of items that go through the encoder together."""
    place = PlaceholderRange(0, trial.family.layout(media[0].info).length)
    items = [make_item(trial, one, place) for one in media]
    ItemEncoder(trial.model, CPU, trial.dtype).encode(items)
    return [item.features for item in items if item.features is not None]


def _agree(trial: Trial, expected: list[Tensor], actual: list[Tensor]) -> bool:
    differences = (float((one - other).abs().max()) for one, other in zip(expected, actual, strict=True))
    return max(differences) <= trial.tolerance(torch.cat(expected))


class _Encoder:
    """What encoding needs of a model; `shapes` are those of the last features."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.shapes: list[list[int]] = []

    def get_input_embeddings(self) -> nn.Module:
        """The model's own."""
        embeddings: nn.Module = self._model.get_input_embeddings()
        return embeddings

    def embed_multimodal(self, **tensors: Any) -> list[Tensor]:
        """The model's own, with a note of the shapes."""
        features: list[Tensor] = self._model.embed_multimodal(**tensors)
        self.shapes = [list(one.shape) for one in features]
        return features
