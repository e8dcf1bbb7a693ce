"""Engine-level fixtures: a real tiny checkpoint, its booted engine, and transformers as the reference."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from executor_service.engine.boot import BootedEngine, boot
from executor_service.engine.core import Engine
from executor_service.engine.messages import EngineConfig, SamplingParams, StepReport, TokenLogprobs
from executor_service.engine.request import EngineItem, Request
from registry import MediaInfo, MediaItem, MediaLimits, ProcessorInputs
from registry.family import ModelFamily
from tests.checkpoints import make_llava_checkpoint
from tests.executor_service.scene import scene
from tests.executor_service.serving import channel, executor_settings, planner, server

__all__ = ["channel", "executor_settings", "planner", "scene", "server"]

GREEDY = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava_checkpoint(tmp_path_factory.mktemp("llava"))


def boot_engine(checkpoint: Path, **config: object) -> BootedEngine:
    settings = {
        "dtype": "float64",
        "check_integrity": True,
        "limits": MediaLimits({"image": 4}),
        "max_num_batched_tokens": 512,
        **config,
    }
    return boot(EngineConfig(model_dir=checkpoint, **settings), lambda progress: None)


class Bench:
    """An engine, its family and the reference model on the same checkpoint."""

    def __init__(self, checkpoint: Path, booted: BootedEngine, reference: LlavaForConditionalGeneration) -> None:
        self.booted = booted
        self.engine: Engine = booted.engine
        self.family: ModelFamily = booted.family
        self.reference = reference

    def request(self, number: int, text: str, pictures: list[Image.Image], **sampling: object) -> Request:
        infos = [MediaInfo.image(picture.height, picture.width) for picture in pictures]
        ids = self.family.ctx.tokenizer(text)["input_ids"]
        inputs = self.family.process(ProcessorInputs(ids, infos))
        items = [
            EngineItem(placeholder, "image", layout, self._tensors(info, picture))
            for placeholder, layout, info, picture in zip(
                inputs.placeholders, inputs.layouts, infos, pictures, strict=True
            )
        ]
        params = SamplingParams(**{"max_tokens": 12, **GREEDY, **sampling})
        return Request(number, inputs.prompt_token_ids, items, params, self.booted.report.max_model_len)

    def _tensors(self, info: MediaInfo, picture: Image.Image) -> dict[str, torch.Tensor]:
        arrays = self.family.map_item(MediaItem(info, picture))
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def run(self, requests: list[Request], steps: int | None = None) -> dict[int, list[int]]:
        """Tokens by request, of all steps or the first `steps`."""
        return tokens_of(self.reports(requests, steps))

    def reports(self, requests: list[Request], steps: int | None = None) -> list[StepReport]:
        """Of every step until all have ended, or the first `steps`."""
        for request in requests:
            self.engine.add(request)
        reports: list[StepReport] = []
        while self.engine.has_work and len(reports) != steps:
            reports.append(self.engine.step())
        return reports

    def logprobs(self, requests: list[Request]) -> dict[int, list[TokenLogprobs]]:
        """Log probabilities of every token by request."""
        said: dict[int, list[TokenLogprobs]] = {request.request_id: [] for request in requests}
        for report in self.reports(requests):
            for index, entry in report.tokens.logprobs:
                said[report.tokens.request_ids[index]].append(entry)
        return said

    def expected(self, request: Request) -> list[int]:
        """transformers' greedy continuation of the same prompt and pixels."""
        prompt = request.token_ids[: request.num_prompt_tokens]
        pixels = [
            torch.from_numpy(
                item.layout.tensors["pixel_values"].normalization.apply(item.tensors["pixel_values"].numpy())
            )
            for item in request.items
        ]
        kwargs = {}
        if request.items and "image_sizes" in request.items[0].layout.constants:
            sizes = [torch.from_numpy(item.layout.constants["image_sizes"]) for item in request.items]
            kwargs = {"pixel_values": torch.cat(pixels).to(self.reference.dtype), "image_sizes": torch.stack(sizes)}
        elif pixels:
            kwargs = {"pixel_values": torch.stack(pixels).to(self.reference.dtype)}
        count = request.max_tokens - request.num_prompt_tokens
        ids = torch.from_numpy(prompt.copy())[None]
        with torch.inference_mode():
            out = self.reference.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
                do_sample=False, eos_token_id=None, pad_token_id=0, **kwargs,
            )  # fmt: skip
        return out[0, len(prompt) :].tolist()


def tokens_of(reports: list[StepReport]) -> dict[int, list[int]]:
    """By request; of one without any, an empty list."""
    tokens: defaultdict[int, list[int]] = defaultdict(list)
    for report in reports:
        for number, token in zip(report.tokens.request_ids, report.tokens.token_ids, strict=True):
            tokens[number].append(token)
    return tokens


def load_reference(checkpoint: Path, dtype: torch.dtype = torch.float64) -> LlavaForConditionalGeneration:
    return AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=dtype).eval()


@pytest.fixture(scope="session")
def reference(checkpoint: Path) -> LlavaForConditionalGeneration:
    return load_reference(checkpoint)


def picture(seed: int, height: int = 60, width: int = 80) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
