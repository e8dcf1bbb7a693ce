"""The arm to compare with: transformers' `generate` in this process, one by one or in padded batches."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText
from transformers.image_utils import load_image


@dataclass(frozen=True)
class Task:
    """A picture file, its expanded prompt, and how many tokens to generate."""

    file: bytes
    prompt_token_ids: Sequence[int]
    max_tokens: int


class Reference:
    """Decodes and maps the same files; the expanded prompts are given, which is to its advantage."""

    def __init__(self, model_dir: Path) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32).eval()
        self.processor = AutoImageProcessor.from_pretrained(model_dir, backend="pil")

    def run(self, tasks: Sequence[Task], batch_size: int = 1) -> float:
        """Seconds for all of them. Batches are sorted by length, so that little is computed for naught."""
        start = time.perf_counter()
        ordered = sorted(tasks, key=lambda task: task.max_tokens) if batch_size > 1 else tasks
        for first in range(0, len(ordered), batch_size):
            self.generate(ordered[first : first + batch_size])
        return time.perf_counter() - start

    @torch.inference_mode()
    def generate(self, tasks: Sequence[Task]) -> None:
        """One static batch, padded on the left, up to its longest answer."""
        images = [load_image(Image.open(io.BytesIO(task.file))) for task in tasks]
        tensors: dict[str, Any] = dict(self.processor(images=images, return_tensors="pt"))
        longest = max(len(task.prompt_token_ids) for task in tasks)
        ids = torch.zeros((len(tasks), longest), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, task in enumerate(tasks):
            ids[row, longest - len(task.prompt_token_ids) :] = torch.tensor(task.prompt_token_ids)
            mask[row, longest - len(task.prompt_token_ids) :] = 1
        count = max(task.max_tokens for task in tasks)
        output = self.model.generate(
            input_ids=ids, attention_mask=mask, **tensors, max_new_tokens=count, min_new_tokens=count,
            do_sample=False, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        assert output.shape[-1] == longest + count
