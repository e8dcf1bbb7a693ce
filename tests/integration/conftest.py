"""Both services on a tiny random checkpoint, and transformers as the reference."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, LlavaForConditionalGeneration
from transformers.image_utils import load_image

from diptych.v1 import preprocess_pb2, tensor_pb2
from tests.checkpoints import make_llava_checkpoint
from tests.services import Stack, stack


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return make_llava_checkpoint(tmp_path_factory.mktemp("wire"))


@pytest.fixture(scope="module")
def served(checkpoint) -> Iterator[Stack]:
    with stack(checkpoint, executor={"max_num_batched_tokens": 96, "max_num_seqs": 16}) as services:
        yield services


@pytest.fixture(autouse=True)
def nothing_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test both services are at rest and every resource is whole."""
    yield
    if "served" in request.fixturenames:
        request.getfixturevalue("served").check_idle()


def picture_bytes(seed: int, height: int = 60, width: int = 80, file_format: str = "PNG", mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, file_format)
    return buffer.getvalue()


def media(data: bytes) -> preprocess_pb2.Media:
    return preprocess_pb2.Media(modality=tensor_pb2.MODALITY_IMAGE, data=data)


def prompt_request(text: str, pictures: list[bytes], stop: tuple[str, ...] = (), **sampling):
    params = tensor_pb2.SamplingParams(**{"max_tokens": 10, "temperature": 0, "ignore_eos": True, **sampling})
    prompt = preprocess_pb2.Prompt(text=text, media=[media(data) for data in pictures])
    return preprocess_pb2.GenerateRequest(prompt=prompt, sampling=params, stop=stop)


class Reference:
    """transformers end to end: load_image, PIL image processor, tokenizer, generate."""

    def __init__(self, checkpoint) -> None:
        self.model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float64).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
        self.image_token = self.tokenizer.convert_ids_to_tokens(self.model.config.image_token_id)

    def prompt_ids(self, text: str, num_features: int = 16) -> list[int]:
        return self.tokenizer(text.replace(self.image_token, self.image_token * num_features))["input_ids"]

    def generate(self, text: str, pictures: list[bytes], max_tokens: int) -> list[int]:
        ids = torch.tensor([self.prompt_ids(text)])
        kwargs = {}
        if pictures:
            images = [load_image(Image.open(io.BytesIO(data))) for data in pictures]
            pixels = self.processor(images=images, return_tensors="np")["pixel_values"]
            kwargs["pixel_values"] = torch.from_numpy(np.stack(pixels)).double()
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False,
                eos_token_id=None, pad_token_id=0, **kwargs,
            )  # fmt: skip
        return out[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="session")
def reference(checkpoint) -> Reference:
    return Reference(checkpoint)
