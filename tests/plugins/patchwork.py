"""A family in one file: the class is the model too, a decoder of its own with our attention."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from executor_service.layers import Attention
from registry import (
    MULTIMODAL_REGISTRY,
    InputContext,
    ItemLayout,
    MediaInfo,
    MediaItem,
    Run,
    SupportsMultiModal,
    TensorSpec,
)

CELL, MAX_SIDE = 20, 6
START, ROW_END = 6, 7


class PatchworkConfig(PreTrainedConfig):
    model_type = "patchwork"
    vocab_size: int = 328
    hidden_size: int = 32
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    max_position_embeddings: int = 256
    image_token_id: int = 3


def grid(info: MediaInfo) -> tuple[int, int]:
    """Rows and columns of cells."""
    height, width = (min(-(-side // CELL), MAX_SIDE) for side in info.size)
    return height, width


def layout(ctx: InputContext, media: MediaInfo) -> ItemLayout:
    """Every cell is a feature, and every row has an end."""
    rows, columns = grid(media)
    row = (Run(ctx.model_config.image_token_id, columns), Run(ROW_END, 1, False))
    return ItemLayout((Run(START, 1, False), *row * rows), {"cells": TensorSpec("float32", (rows * columns, 3))})


def map_image(ctx: InputContext, item: MediaItem) -> dict[str, np.ndarray]:
    """The mean colour of every cell."""
    rows, columns = grid(item.info)
    pixels = np.asarray(item.data, dtype=np.float32) / 255
    cells = [cell.mean((0, 1)) for row in np.array_split(pixels, rows) for cell in np.array_split(row, columns, axis=1)]
    return {"cells": np.stack(cells)}


class Layer(nn.Module):
    def __init__(self, index: int, config: PatchworkConfig) -> None:
        super().__init__()
        width, self.head_dim = config.hidden_size, config.hidden_size // config.num_heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, config.num_kv_heads * self.head_dim)
        self.value = nn.Linear(width, config.num_kv_heads * self.head_dim)
        self.attention = Attention(index, config.num_heads, config.num_kv_heads, self.head_dim)
        self.output = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        query, key, value = (
            part(normed).unflatten(-1, (-1, self.head_dim)) for part in (self.query, self.key, self.value)
        )
        hidden = hidden + self.output(self.attention(query, key, value).flatten(-2))
        return hidden + self.mlp(hidden)


@MULTIMODAL_REGISTRY.register_image_layout(layout)
@MULTIMODAL_REGISTRY.register_image_input_mapper(map_image)
class PatchworkForImages(SupportsMultiModal, nn.Module):
    config_class = PatchworkConfig

    def __init__(self, ctx: InputContext) -> None:
        super().__init__()
        config = ctx.get_config(PatchworkConfig)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.places = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.colors = nn.Linear(3, config.hidden_size)
        self.layers = nn.ModuleList(Layer(index, config) for index in range(config.num_layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def embed_multimodal(self, cells: list[Tensor]) -> list[Tensor]:
        return [self.colors(colors) * math.sqrt(colors.shape[-1]) for colors in cells]

    def forward(self, input_ids: Tensor, positions: Tensor, inputs_embeds: Tensor) -> Tensor:
        hidden = inputs_embeds + self.places(positions)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden

    def compute_logits(self, rows: Tensor) -> Tensor:
        return self.head(rows)


def random_weights(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """By fan-in, so that every part matters."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(weight.shape, generator=generator) * (2.0 / math.sqrt(weight.shape[-1]))
        for name, weight in model.named_parameters()
    }
