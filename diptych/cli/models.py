"""List the models of a preprocess service.

examples:
  diptych models --address 127.0.0.1:50051
  diptych models --address 127.0.0.1:50051 --json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from diptych.cli.output import print_json
from diptych.cli.peer import preprocess_client
from diptych.client.results import Model


def add_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Declare flags."""
    parser.add_argument("--address", required=True, metavar="HOST:PORT", help="of the preprocess service")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Ask and print."""
    with preprocess_client(arguments.address) as client:
        models = client.list_models()
    if arguments.json:
        print_json({"models": [_as_json(model) for model in models]})
    else:
        for model in models:
            _print_model(model)
    return 0


def _as_json(model: Model) -> dict[str, object]:
    return {
        "name": model.name,
        "architecture": model.architecture,
        "placeholders": model.placeholders,
        "max_model_len": model.max_model_len,
        "max_items_per_prompt": model.max_items_per_prompt,
        "max_tokens_per_item": model.max_tokens_per_item,
        "fingerprint": model.fingerprint.hex(),
        "num_ready_executors": model.num_ready_executors,
    }


def _print_model(model: Model) -> None:
    print(f"{model.name}  ({model.architecture})")
    print(f"  max_model_len   {model.max_model_len} tokens, prompt and answer")
    for modality, text in model.placeholders.items():
        most = model.max_items_per_prompt.get(modality, 0)
        tokens = model.max_tokens_per_item.get(modality, 0)
        print(f"  {modality:<14}  {text!r} in a prompt; at most {most} per prompt, {tokens} tokens each")
    print(f"  executors       {model.num_ready_executors} ready")
    print(f"  fingerprint     {model.fingerprint.hex()}")
