"""What no engine beats: bytes at the measured streaming rates, operations at the measured rate of a library product.

Work is counted from a checkpoint's configuration, the least that gives the answer: the encoder's layers up to the one
whose features are used, causal attention without its upper half, logits of one row per token that is sampled; of the
last decoder layer keys and values of every token, and all else for those rows alone.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig

from benchmarks.gpu.timing import measure_ceilings

SIDE: Final = 8192
SHORT_PRODUCTS: Final = 35
SUSTAINED_SECONDS: Final = 1.5


@dataclass(frozen=True)
class Rates:
    """Bytes per second read and written, and bf16 operations per second: at first, and for as long as one likes."""

    read: float
    write: float
    matrix_short: float
    matrix_sustained: float


def measure_rates() -> Rates:
    """All of this very run."""
    ceilings = measure_ceilings()
    torch.cuda.empty_cache()
    a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    torch.cuda.synchronize()
    time.sleep(1.0)
    short = _products_per_second(a, b, out, SHORT_PRODUCTS)
    repeats = max(1, int(SUSTAINED_SECONDS * short))
    _products_per_second(a, b, out, repeats)
    sustained = _products_per_second(a, b, out, repeats)
    operations = 2 * SIDE**3
    return Rates(ceilings.read, ceilings.write, operations * short, operations * sustained)


def _products_per_second(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, count: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        torch.mm(a, b, out=out)
    end.record()
    end.synchronize()
    return 1000 * count / begin.elapsed_time(end)


@dataclass(frozen=True)
class Work:
    """Bytes that must be read and operations that must be done."""

    num_bytes: float
    operations: float

    def __add__(self, other: Work) -> Work:
        return Work(self.num_bytes + other.num_bytes, self.operations + other.operations)

    def seconds(self, rates: Rates, matrix_rate: float) -> float:
        """The larger of the two."""
        return max(self.num_bytes / rates.read, self.operations / matrix_rate)

    def floors(self, rates: Rates) -> dict[str, float]:
        """Milliseconds at the short and at the sustained matrix rate."""
        return {
            "short_ms": 1000 * self.seconds(rates, rates.matrix_short),
            "sustained_ms": 1000 * self.seconds(rates, rates.matrix_sustained),
        }


class ModelWork:
    """Counts the work of one LLaVA-shaped checkpoint; `item_size` bytes per element."""

    def __init__(self, model: Path, item_size: int = 2) -> None:
        config: Any = AutoConfig.from_pretrained(model)
        self._text, self._vision = config.text_config, config.vision_config
        self._item_size = item_size
        layer = config.vision_feature_layer
        self._vision_layers = self._vision.num_hidden_layers + 1 + layer if layer < 0 else layer
        head_dim = getattr(self._text, "head_dim", None) or self._text.hidden_size // self._text.num_attention_heads
        self._q_width = self._text.num_attention_heads * head_dim
        self._kv_width = self._text.num_key_value_heads * head_dim

    @property
    def layer_parameters(self) -> int:
        """Elements of one decoder layer's matrices."""
        hidden, inner = self._text.hidden_size, self._text.intermediate_size
        return hidden * (2 * self._q_width + 2 * self._kv_width + 3 * inner)

    @property
    def kv_parameters(self) -> int:
        """Those of them that make keys and values."""
        return int(2 * self._text.hidden_size * self._kv_width)

    @property
    def head_parameters(self) -> int:
        """Elements of the output head."""
        return int(self._text.hidden_size * self._text.vocab_size)

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers."""
        return int(2 * self._text.num_hidden_layers * self._kv_width * self._item_size)

    @property
    def weight_bytes(self) -> int:
        """What a decode step reads of the weights; of the embedding it reads no more than a few rows."""
        return self._item_size * (self._text.num_hidden_layers * self.layer_parameters + self.head_parameters)

    def decode(self, batch: int, context: float) -> Work:
        """One token for each of `batch` requests that have `context` tokens."""
        layers = self._text.num_hidden_layers
        products = 2 * batch * (layers * self.layer_parameters + self.head_parameters)
        attention = 4 * batch * context * layers * self._q_width
        return Work(self.weight_bytes + batch * context * self.kv_bytes_per_token, products + attention)

    def prefill(self, num_prompts: int, length: int, num_tiles: int) -> Work:
        """`num_prompts` prompts of `length` tokens, and the `num_tiles` tiles of each; one sampled token each."""
        layers = self._text.num_hidden_layers
        of_every_token = (layers - 1) * self.layer_parameters + self.kv_parameters
        of_the_last = self.layer_parameters - self.kv_parameters + self.head_parameters
        products = 2 * (length * of_every_token + of_the_last)
        attention = 2 * length**2 * (layers - 1) * self._q_width + 4 * length * self._q_width
        language = Work(self.weight_bytes / num_prompts, products + attention)
        one = language + self._tile_work(num_tiles, num_prompts)
        return Work(one.num_bytes * num_prompts, one.operations * num_prompts)

    def _tile_work(self, num_tiles: int, num_prompts: int) -> Work:
        """Patches, the tower's layers and the projector, of one prompt's tiles."""
        if not num_tiles:
            return Work(0, 0)
        vision, width = self._vision, self._text.hidden_size
        patches = (vision.image_size // vision.patch_size) ** 2
        patch_parameters = 3 * vision.patch_size**2 * vision.hidden_size
        layer = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
        projector = vision.hidden_size * width + width**2
        tokens = patches + 1
        attention = 4 * tokens**2 * vision.hidden_size * self._vision_layers
        products = 2 * (patches * (patch_parameters + projector) + tokens * self._vision_layers * layer)
        parameters = patch_parameters + projector + self._vision_layers * layer
        return Work(self._item_size * parameters / num_prompts, num_tiles * (products + attention))


def describe(rates: Rates) -> dict[str, float]:
    """For the result, and a line for people."""
    print(
        f"read {rates.read / 1e9:.0f} GB/s, write {rates.write / 1e9:.0f} GB/s; bf16 products "
        f"{rates.matrix_short / 1e12:.0f} TFLOP/s at first, {rates.matrix_sustained / 1e12:.0f} sustained",
        flush=True,
    )
    return {f"{name}_per_second": value for name, value in asdict(rates).items()}
