"""Every sampling parameter through both services, against transformers on the same checkpoint."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import load_image

from diptych.client import Client, Media, Prompt
from diptych.v1 import preprocess_pb2, tensor_pb2
from tests.integration.conftest import Reference, picture_bytes, prompt_request
from tests.integration.test_tokens import collect

PICTURES = [picture_bytes(1), picture_bytes(2, 50, 90)]
TEXT = "look <image> and <image> then say"
EOS = 2


def model_input(reference: Reference, text: str = TEXT, pictures: list[bytes] = PICTURES) -> dict[str, torch.Tensor]:
    ids = torch.tensor([reference.prompt_ids(text)])
    images = [load_image(Image.open(io.BytesIO(data))) for data in pictures]
    kwargs = {}
    if images:
        pixels = reference.processor(images=images, return_tensors="np")["pixel_values"]
        kwargs = {"pixel_values": torch.from_numpy(np.stack(pixels)).double()}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **kwargs}


def generate(reference: Reference, **arguments) -> list[int]:
    inputs = model_input(reference)
    settings = {"max_new_tokens": 10, "eos_token_id": None, **arguments}
    with torch.inference_mode():
        out = reference.model.generate(**inputs, do_sample=False, pad_token_id=0, **settings)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def ask(served, **sampling) -> list[int]:
    return collect(served.stub, prompt_request(TEXT, PICTURES, **sampling))[0]


@pytest.fixture(scope="module")
def plain(served) -> list[int]:
    return ask(served)


def sequences(*token_ids: list[int]) -> list[tensor_pb2.TokenSequence]:
    return [tensor_pb2.TokenSequence(token_ids=ids) for ids in token_ids]


def test_repetition_penalty(served, reference, plain) -> None:
    tokens = ask(served, repetition_penalty=2.5)
    assert tokens == generate(reference, repetition_penalty=2.5)
    assert tokens != plain


@pytest.mark.parametrize("field", ["presence_penalty", "frequency_penalty"])
def test_output_penalties(served, plain, reference, field: str) -> None:
    """Of the first two tokens only the first is untouched, and the second is lowered if it is the first again."""
    tokens = ask(served, **{field: 2.0, "logit_bias": {plain[0]: 50.0}, "logprobs": 0})
    assert tokens == [plain[0]] * 10, "a penalty of 2 is less than a bias of 50"
    # With a bias that is just enough to repeat the token, the penalty ends the repetition.
    with torch.inference_mode():
        inputs = model_input(reference)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[plain[0]]])], dim=-1)
        row = reference.model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"]).logits[0, -1]
    bias = float(row.max() - row[plain[0]]) + 1.0
    assert ask(served, logit_bias={plain[0]: bias})[:2] == [plain[0], plain[0]]
    assert ask(served, logit_bias={plain[0]: bias}, **{field: 2.0})[:2] == [plain[0], int(row.argmax())]
    assert ask(served, logit_bias={plain[0]: bias}, **{field: 0.5})[:2] == [plain[0], plain[0]]


def test_logit_bias(served, reference, plain) -> None:
    bias = {plain[0]: -100.0, 40: 1.5, 327: 2.0}
    expected = generate(reference, sequence_bias=[[[token], value] for token, value in bias.items()])
    assert ask(served, logit_bias=bias) == expected != plain


def test_bad_words_as_token_ids(served, reference, plain) -> None:
    words = [plain[:1], plain[2:4]]
    assert ask(served, bad_words=sequences(*words)) == generate(reference, bad_words_ids=words) != plain


def test_bad_words_as_texts(served, reference) -> None:
    """Letters of the answer never come again, at the beginning of a word or within the text."""
    request = prompt_request(TEXT, PICTURES, max_tokens=40)
    _, text, _ = collect(served.stub, request)
    words = sorted({letter for letter in text if letter.isascii() and letter.isalpha()})[:5]
    assert words
    ids = [reference.tokenizer(f"{space}{word}", add_special_tokens=False)["input_ids"]
           for word in words for space in ("", " ")]  # fmt: skip
    request.bad_words.extend(words)
    assert collect(served.stub, request)[0] == generate(reference, bad_words_ids=ids, max_new_tokens=40)


@pytest.mark.parametrize("min_tokens", [0, 4])
def test_min_tokens(served, reference, min_tokens: int) -> None:
    settings = {"logit_bias": {EOS: 60.0}, "ignore_eos": False, "min_tokens": min_tokens}
    tokens, _, final = collect(served.stub, prompt_request(TEXT, PICTURES, **settings))
    assert tokens == generate(
        reference, sequence_bias=[[[EOS], 60.0]], eos_token_id=EOS, **({"min_new_tokens": 4} if min_tokens else {})
    )
    assert (len(tokens), final.finish_reason) == (min_tokens + 1, tensor_pb2.FINISH_REASON_STOP)


def test_min_p_of_one_leaves_the_likeliest(served, plain) -> None:
    assert ask(served, temperature=2.0, min_p=1.0, seed=3) == plain
    assert ask(served, temperature=2.0, min_p=1e-6, seed=3) != plain


def test_neutral_values_are_the_defaults(served, plain) -> None:
    """Set to what its comment names, a field changes nothing; unset likewise."""
    neutral = {
        "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0,
        "top_p": 1.0, "top_k": 0, "logit_bias": {5: 0.0},
    }  # fmt: skip
    assert ask(served, **neutral) == plain
    sampled = {"temperature": 1.0, "seed": 9}
    assert ask(served, **neutral, **sampled) == ask(served, **sampled) == ask(served, seed=9, temperature=1.0)


# --- log probabilities --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected_scores(reference) -> torch.Tensor:
    inputs = model_input(reference)
    with torch.inference_mode():
        logits = reference.model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"]).logits[0]
    return logits.log_softmax(-1)


def test_prompt_logprobs(served, reference, expected_scores) -> None:
    """All of them before the first token, in chunks as they are computed, pictures included."""
    text = TEXT + " word" * 60  # longer than one step's budget
    request = prompt_request(text, PICTURES, prompt_logprobs=3, logprobs=2)
    responses = list(served.stub.Generate(request))
    first = next(index for index, response in enumerate(responses) if response.token_ids)
    entries = [entry for response in responses[: first + 1] for entry in response.prompt_logprobs]
    assert sum(bool(response.prompt_logprobs) for response in responses) > 1
    assert not any(response.prompt_logprobs for response in responses[first + 1 :])
    prompt = reference.prompt_ids(text)
    assert [entry.chosen.token_id for entry in entries] == prompt[1:]
    known = len(expected_scores)
    for row, entry in zip(expected_scores[: known - 5], entries, strict=False):
        assert entry.chosen.logprob == pytest.approx(float(row[entry.chosen.token_id]), rel=1e-5)
        assert [one.token_id for one in entry.top] == row.topk(3).indices.tolist()
        assert [one.logprob for one in entry.top] == pytest.approx(row.topk(3).values.tolist(), rel=1e-5)


def test_logprobs_are_the_models_own(served, expected_scores) -> None:
    """Of the first output token: as the model says, whatever is done to its logits afterwards."""
    changed = {"repetition_penalty": 3.0, "logit_bias": {9: 80.0}, "temperature": 2.0, "top_k": 3, "seed": 1}
    response = next(iter(served.stub.Generate(prompt_request(TEXT, PICTURES, logprobs=4, **changed))))
    (entry,) = response.logprobs
    assert entry.chosen.token_id == 9
    assert entry.chosen.logprob == pytest.approx(float(expected_scores[-1, 9]), rel=1e-5)
    assert [one.token_id for one in entry.top] == expected_scores[-1].topk(4).indices.tolist()


# --- together -----------------------------------------------------------------------------------------


def everything(number: int) -> preprocess_pb2.GenerateRequest:
    pictures = PICTURES[: number % 3]
    request = prompt_request(
        "<image>" * len(pictures) + f"dream {number}", pictures, temperature=1.3, top_p=0.95, top_k=200, min_p=0.005,
        seed=number, repetition_penalty=1.3, presence_penalty=0.3, frequency_penalty=0.2, logit_bias={7: 2.0, 8: -3.0},
        min_tokens=3, bad_words=sequences([11], [7, 12]), logprobs=1, prompt_logprobs=number % 2, max_tokens=16,
    )  # fmt: skip
    request.bad_words.append("a")
    return request


def test_a_seeded_answer_does_not_depend_on_the_others(served) -> None:
    def answer(number: int) -> tuple:
        responses = list(served.stub.Generate(everything(number), timeout=60))
        scores = [entry for response in responses for entry in response.prompt_logprobs]
        return tuple(token for response in responses for token in response.token_ids), len(scores)

    alone = [answer(number) for number in range(9)]
    with ThreadPoolExecutor(9) as pool:
        assert list(pool.map(answer, range(9))) == alone
    assert len({tokens for tokens, _ in alone}) == 9


def test_the_typed_client(served, reference) -> None:
    with Client(served.preprocess_address) as client:
        prompt = Prompt(TEXT, [Media(data) for data in PICTURES])
        answer = client.generate(
            prompt, max_tokens=6, temperature=0.0, ignore_eos=True, repetition_penalty=1.5, prompt_logprobs=1,
            bad_words=["zebra", [5, 6]], logit_bias={3: -5.0}, min_tokens=2, logprobs=0,
        )  # fmt: skip
    assert [entry.token_id for entry in answer.prompt_logprobs] == reference.prompt_ids(TEXT)[1:]
    assert all(len(entry.top) == 1 for entry in answer.prompt_logprobs)
    assert [entry.token_id for entry in answer.logprobs] == answer.token_ids
    assert len(answer.token_ids) == 6
