"""LLaVA-NeXT over the wire: prompt ids, tokens and log probabilities are those of transformers."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, LlavaNextForConditionalGeneration, LlavaNextProcessor

from diptych.v1 import preprocess_pb2
from tests.checkpoints import make_llava_checkpoint
from tests.integration.conftest import picture_bytes, prompt_request
from tests.services import Stack, stack

PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
SIZES = [(60, 80), (200, 30), (112, 112), (40, 41), (33, 170), (352, 748)]
NUM_TOP = 3


@pytest.fixture(scope="module")
def next_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava_checkpoint(tmp_path_factory.mktemp("next") / "model", pinpoints=PINPOINTS)


@pytest.fixture(scope="module")
def served(next_checkpoint: Path) -> Iterator[Stack]:
    with stack(next_checkpoint, executor={"max_num_batched_tokens": 96, "max_num_seqs": 8}) as services:
        yield services


class Reference:
    """transformers end to end, logits included."""

    def __init__(self, checkpoint: Path) -> None:
        self.model = LlavaNextForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float64).eval()
        config = self.model.config
        self.processor = LlavaNextProcessor(
            AutoImageProcessor.from_pretrained(checkpoint, backend="pil"),
            AutoTokenizer.from_pretrained(checkpoint),
            patch_size=config.vision_config.patch_size,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            num_additional_image_tokens=1,
        )

    @torch.inference_mode()
    def generate(self, case: Case) -> tuple[list[int], list[int], torch.Tensor]:
        """Prompt ids, output ids, and the log probabilities [output, vocabulary]."""
        images = [Image.open(io.BytesIO(data)) for data in case.pictures] or None
        inputs = self.processor(text=case.text, images=images, return_tensors="pt")
        if images:
            inputs["pixel_values"] = inputs["pixel_values"].double()
        out = self.model.generate(
            **inputs, max_new_tokens=case.max_tokens, do_sample=False, eos_token_id=None, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        prompt = inputs["input_ids"][0].tolist()
        return prompt, out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits).log_softmax(-1)


@dataclass(frozen=True)
class Case:
    text: str
    pictures: list[bytes]
    max_tokens: int


def make_case(number: int) -> Case:
    count = number % 4
    pictures = [picture_bytes(9 * number + i, *SIZES[(number + i) % len(SIZES)]) for i in range(count)]
    text = "look " * (number % 3) + " then ".join(["<image>"] * count) + " what" * (number % 5) + "?"
    return Case(text, pictures, 4 + number % 7)


def ask(served: Stack, case: Case) -> list[preprocess_pb2.GenerateResponse]:
    request = prompt_request(case.text, case.pictures, max_tokens=case.max_tokens, logprobs=NUM_TOP)
    return list(served.stub.Generate(request, timeout=120))


def test_tokens_and_logprobs_are_those_of_transformers(served: Stack, next_checkpoint: Path) -> None:
    reference = Reference(next_checkpoint)
    cases = [make_case(number) for number in range(12)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda case: ask(served, case), cases))
    for case, responses in zip(cases, answers, strict=True):
        prompt, tokens, logprobs = reference.generate(case)
        final = responses[-1].final
        assert final.usage.prompt_tokens == len(prompt)
        assert final.usage.image_tokens == prompt.count(reference.model.config.image_token_id)
        assert [token for response in responses for token in response.token_ids] == tokens
        entries = [entry for response in responses for entry in response.logprobs]
        assert len(entries) == len(tokens)
        for entry, row in zip(entries, logprobs, strict=True):
            top = row.topk(NUM_TOP)
            assert [one.token_id for one in entry.top] == top.indices.tolist()
            assert [one.logprob for one in entry.top] == pytest.approx(top.values.tolist(), abs=1e-5)
            assert entry.chosen.logprob == pytest.approx(row[entry.chosen.token_id].item(), abs=1e-5)


def test_a_plan_has_the_processors_ids(served: Stack, next_checkpoint: Path) -> None:
    reference = Reference(next_checkpoint)
    for number, size in enumerate(SIZES):
        case = Case("<image> what?", [picture_bytes(number, *size)], 1)
        plan = served.stub.Plan(preprocess_pb2.PlanRequest(prompt=prompt_request(case.text, case.pictures).prompt))
        inputs = reference.processor(text=case.text, images=[Image.open(io.BytesIO(case.pictures[0]))])
        assert list(plan.prompt_token_ids) == list(inputs["input_ids"][0])
