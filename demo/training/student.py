"""The model while it learns: one forward pass over a batch, with two throwaway heads that teach its tower."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaNextForConditionalGeneration

from demo.training.anyres import GRID, NEWLINE, PATCH_SIDE, TILE_SIDE
from demo.training.architecture import MEAN, STD
from demo.training.batches import TEXT, UNSEEN, Batch
from demo.training.material import NUM_CLASSES


@dataclass(frozen=True)
class Outcome:
    """Losses of a batch, and for every request whether each token of its answers is the most likely one."""

    answer_loss: Tensor
    tower_loss: Tensor
    right: Tensor


class Student(nn.Module):
    """Equals `LlavaNextForConditionalGeneration`, but takes uint8 tiles and computes only the logits of answers."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: LlavaNextForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        width = model.config.vision_config.hidden_size
        self.class_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1 + NUM_CLASSES))
        self.centre_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2))
        self.neighbour_heads = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * (1 + NUM_CLASSES)))
        self.register_buffer("mean", 255 * torch.tensor(MEAN), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(STD), persistent=False)

    def compile_layers(self) -> None:
        """Compile one tower layer and one language layer, which all the others then share."""
        tower = self.model.model.vision_tower
        tower_layers = getattr(tower, "vision_model", tower).encoder.layers
        for layer in [*tower_layers, *self.model.model.language_model.layers]:
            layer.compile(dynamic=True)

    def forward(self, batch: Batch) -> Outcome:
        """Answer, and find the objects in every tile."""
        pixels = ((batch.tiles - self.mean) / self.std).permute(0, 3, 1, 2)
        patches = self.model.model.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:]
        logits = self._answer(batch, patches)
        wrong = (logits.argmax(-1) != batch.answer_ids).float()
        num_wrong = torch.zeros(len(batch.input_ids), device=wrong.device).index_add(0, batch.answer_rows, wrong)
        loss = functional.cross_entropy(logits.float(), batch.answer_ids)
        return Outcome(loss, self._find(batch, patches), num_wrong == 0)

    def _answer(self, batch: Batch, patches: Tensor) -> Tensor:
        """Return the logits of every answer token."""
        model = self.model.model
        features = model.multi_modal_projector(patches).flatten(0, 1)
        embeddings = model.get_input_embeddings()(batch.input_ids)
        # Text looks at some feature too, each token at its own: a gradient summed from all of them into one is slow.
        anywhere = torch.arange(batch.sources.numel(), device=features.device).view_as(batch.sources) % len(features)
        seen = features[torch.where(batch.sources < 0, anywhere, batch.sources)].to(embeddings.dtype)
        sources = batch.sources[..., None]
        inputs = torch.where(sources == TEXT, embeddings, torch.where(sources == NEWLINE, model.image_newline, seen))
        hidden = model.language_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        return self.model.lm_head(hidden.flatten(0, 1)[batch.answer_at])

    def _find(self, batch: Batch, patches: Tensor) -> Tensor:
        """Teach each patch what covers it, how far away that object's centre is, and what stands beside it."""
        classes, offsets, neighbours = targets(batch.boxes, batch.neighbours)
        covered = classes > 0
        class_loss = functional.cross_entropy(
            self.class_head(patches).float().flatten(0, 1), classes.flatten(), reduction="none"
        )
        weight = torch.where(covered, 1.0, 0.3).flatten()
        distance = (self.centre_head(patches).float() - offsets).abs().sum(-1)
        beside = self.neighbour_heads(patches).float().unflatten(-1, (2, -1)).flatten(0, 2)
        beside_loss = functional.cross_entropy(beside, neighbours.flatten(), ignore_index=UNSEEN)
        centre_loss = (distance * covered).sum() / covered.sum().clamp(min=1)
        return (class_loss * weight).sum() / weight.sum() + centre_loss + beside_loss


def targets(boxes: Tensor, neighbours: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each patch's class (0: background), the way to its object's centre, in tiles, and what is beside it."""
    at = (torch.arange(GRID, device=boxes.device) + 0.5) * PATCH_SIDE
    x, y = at.repeat(GRID)[None, :, None], at.repeat_interleave(GRID)[None, :, None]
    kind, left, top, right, bottom = boxes[:, None].unbind(-1)
    inside = (kind > 0) & (left <= x) & (x < right) & (top <= y) & (y < bottom)
    classes, which = (kind * inside).max(-1)
    way = torch.stack([(left + right) / 2 - x, (top + bottom) / 2 - y], -1) / TILE_SIDE
    chosen = way.gather(2, which[..., None, None].expand(-1, -1, 1, 2)).squeeze(2)
    beside = neighbours.gather(1, which[..., None].expand(-1, -1, 2))
    return classes.long(), chosen, beside.where(classes[..., None] > 0, UNSEEN)
