"""Ask a checkpoint the held-out questions, with transformers alone, and count the right answers.

    python -m demo.measuring.ask                                                   # the 200 in demo/held_out
    python -m demo.measuring.ask --output demo/model/held_out_answers.json         # and keep what it said
    python -m demo.measuring.ask --picture cat.jpg --question "What is this?"      # a question of one's own

An answer counts if its whole text is right, in a chat of two turns both. Pixels are the PIL image processor's.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoTokenizer, LlavaNextForConditionalGeneration
from transformers.image_utils import load_image

from demo.measuring.index import Question, read_index
from demo.training.anyres import cut
from demo.training.chat import messages
from demo.training.questions import Turn

DEMO = Path(__file__).resolve().parents[1]
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Asker:
    """A loaded checkpoint that answers questions about pictures, greedily."""

    model: LlavaNextForConditionalGeneration
    tokenizer: AutoTokenizer
    image_processor: AutoImageProcessor

    @classmethod
    def load(cls, checkpoint: Path, dtype: torch.dtype = torch.float32) -> Asker:
        """Load weights, tokenizer and the PIL image processor."""
        return cls(
            LlavaNextForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype).eval(),
            AutoTokenizer.from_pretrained(checkpoint),
            AutoImageProcessor.from_pretrained(checkpoint, backend="pil"),
        )

    def render(self, turns: Sequence[Turn], num_images: int) -> str:
        """Word a chat with the chat template, up to the answer of its last turn."""
        chat = messages(turns, num_images)
        return str(self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))

    @torch.inference_mode()
    def answer(self, prompt: str, pictures: Sequence[Image.Image]) -> str:
        """Answer one prompt with as many pictures as it has placeholders."""
        ids = torch.tensor([self._expand(prompt, pictures)])
        inputs = self.image_processor(list(pictures), return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **inputs,
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
        )
        return str(self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))

    def _expand(self, prompt: str, pictures: Sequence[Image.Image]) -> list[int]:
        """Tokenize, and repeat every image token once per feature of its picture; generate() checks the number."""
        image = self.model.config.image_token_id
        counts = iter([len(cut(picture).sources) for picture in pictures])
        ids = self.tokenizer(prompt)["input_ids"]
        return [token for i in ids for token in [i] * (next(counts) if i == image else 1)]


def ask(asker: Asker, question: Question) -> list[str]:
    """Answer every turn, each after the right answers to the earlier ones."""
    pictures = [load_image(str(path)) for path in question.pictures]
    if question.prompt is not None:
        return [asker.answer(question.prompt, pictures)]
    turns = question.turns
    return [asker.answer(asker.render(turns[: n + 1], len(pictures)), pictures) for n in range(len(turns))]


def ask_all(asker: Asker, folder: Path) -> dict[str, Any]:
    """Ask everything in the folder; return right and asked per type, and what was said to each question."""
    asked: Counter[str] = Counter()
    right: Counter[str] = Counter()
    said = []
    for question in tqdm(read_index(folder), unit=" questions", dynamic_ncols=True):
        answers = ask(asker, question)
        asked[question.type] += 1
        right[question.type] += answers == question.truth
        said.append(answers)
        if answers != question.truth:
            tqdm.write(f"{question.number:3d} {question.type}: {question.truth} was answered {answers}")
    return {"types": {name: [right[name], asked[name]] for name in asked}, "said": said}


def main() -> None:
    """Ask."""
    parser = _parser()
    args = parser.parse_args()
    if missing := [str(path) for path in args.picture if not path.is_file()]:
        parser.error(f"no such picture: {', '.join(missing)}")
    asker = Asker.load(args.model, getattr(torch, args.dtype))
    if args.question:
        prompt = asker.render([Turn("own", args.question, "")], len(args.picture))
        print(asker.answer(prompt, [load_image(str(path)) for path in args.picture]))
        return
    outcome = ask_all(asker, args.held_out)
    for name, (right, asked) in outcome["types"].items():
        print(f"{name:30} {right:4d} of {asked}")
    print(f"{'all':30} {sum(r for r, _ in outcome['types'].values()):4d} of {len(outcome['said'])}")
    if args.output:
        args.output.write_text(json.dumps(outcome, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    description, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=DEMO / "model", help="checkpoint folder (default: demo/model)")
    parser.add_argument(
        "--held-out", type=Path, default=DEMO / "held_out", help="folder with index.json (default: demo/held_out)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the outcome goes as JSON")
    parser.add_argument("--picture", type=Path, action="append", default=[], help="picture of a question of one's own")
    parser.add_argument("--question", help="a question of one's own, in the chat template")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="(default: %(default)s)")
    return parser


if __name__ == "__main__":
    main()
