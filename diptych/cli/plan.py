"""Show what a prompt with pictures is made of: token ids, placeholder ranges, tensor shapes.

Only the pictures' headers are read; nothing is decoded. With --model no server is needed.

examples:
  diptych plan --model ./llava-1.5-7b-hf --prompt '<image> What is this?' --image cat.jpg
  diptych plan --address 127.0.0.1:50051 --chat --prompt '<image> What is this?' --image cat.jpg --json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diptych.cli.commands import UsageError
from diptych.cli.inputs import add_input_arguments, read_input, read_media
from diptych.cli.output import print_json
from diptych.cli.peer import preprocess_client
from diptych.client.errors import RequestError
from diptych.client.inputs import Chat, Prompt, plan_request
from diptych.client.results import Item, Plan, plan_from_proto
from diptych.client.sync import Client

if TYPE_CHECKING:
    from diptych.service.errors import DiptychError


def add_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Declare flags."""
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--address", metavar="HOST:PORT", help="ask this preprocess service")
    where.add_argument("--model", metavar="DIR", help="plan here, with this checkpoint: no server, no torch")
    add_input_arguments(parser)
    parser.add_argument(
        "--limit-mm-per-prompt",
        metavar="PROMPT",
        help="with --model: media items per prompt, e.g. image=4 (default: 1 each); a server has its own limits",
    )
    parser.add_argument(
        "--plugin", default="", metavar="MODULE", help="with --model: modules with more model families, with commas"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Plan and print."""
    plan = _plan_here(arguments) if arguments.model else _plan_there(arguments)
    if arguments.json:
        print_json(as_json(plan))
    else:
        _print_plan(plan)
    return 0


def as_json(plan: Plan) -> dict[str, object]:
    """The documented JSON form."""
    items = [
        {
            "modality": item.modality,
            "digest": None if item.digest is None else item.digest.hex(),
            "offset": item.offset,
            "length": item.length,
            "tensors": [
                {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape)} for tensor in item.tensors
            ],
        }
        for item in plan.items
    ]
    return {"prompt_token_ids": plan.prompt_token_ids, "items": items}


def _plan_there(arguments: argparse.Namespace) -> Plan:
    if arguments.limit_mm_per_prompt is not None:
        raise UsageError("--limit-mm-per-prompt goes with --model; a server has its own limits")
    read_media(arguments)  # before the connection: a file that is not there needs no server
    with preprocess_client(arguments.address) as client:
        return client.plan(read_input(arguments, find_placeholders(client) if arguments.chat else {}))


def find_placeholders(client: Client) -> dict[str, str]:
    """The served model's placeholder texts by modality."""
    models = client.list_models()
    return models[0].placeholders if models else {}


def _plan_here(arguments: argparse.Namespace) -> Plan:
    read_media(arguments)
    limits = _parse_limits(arguments.limit_mm_per_prompt)
    from diptych.service.errors import DiptychError

    try:
        return _plan_in_process(arguments, limits)
    except DiptychError as error:
        raise to_request_error(error) from None


def _plan_in_process(arguments: argparse.Namespace, limits: dict[str, int]) -> Plan:
    from diptych.service.errors import InvalidInputError
    from preprocess_service.planning import Checkpoint, Planner, RequestLimits
    from preprocess_service.reading import read_input as read_message
    from preprocess_service.servicer import plan_response
    from registry import MediaLimits
    from registry.errors import RegistryError

    media_limits = MediaLimits(limits)
    plugins = [name.strip() for name in arguments.plugin.split(",") if name.strip()]
    try:
        checkpoint = Checkpoint(Path(arguments.model), plugins, media_limits)
    except RegistryError as error:
        raise InvalidInputError(str(error), stage="boot") from error
    prompt: Prompt | Chat = read_input(arguments, checkpoint.family.placeholder_texts)
    request_limits = RequestLimits(media_limits)
    message = read_message(plan_request(prompt, None), request_limits.max_items(checkpoint.family.modalities))
    return plan_from_proto(plan_response(Planner(checkpoint, lambda: request_limits).plan(message)))


def _parse_limits(text: str | None) -> dict[str, int]:
    if text is None:
        return {}
    from pydantic import TypeAdapter, ValidationError

    from diptych.service.settings import Counts

    try:
        limits: dict[str, int] = TypeAdapter(Counts).validate_python(text)
    except ValidationError as error:
        raise UsageError(f"--limit-mm-per-prompt: {error.errors()[0]['msg']}") from None
    return limits


def to_request_error(error: DiptychError) -> RequestError:
    """An error raised in this process, as if a server had given it."""
    return RequestError(error.code.name, error.message, error.metadata)


def _size_of(item: Item) -> str:
    """Rows and columns; audio has none."""
    return "" if item.height is None else f" {item.height}x{item.width}"


def _print_plan(plan: Plan) -> None:
    print(f"{len(plan.prompt_token_ids)} prompt tokens, {len(plan.items)} media items")
    for index, item in enumerate(plan.items):
        print(
            f"  item {index}: {item.modality}{_size_of(item)}, tokens {item.offset} to "
            f"{item.offset + item.length - 1} ({item.length}, {item.num_feature_tokens} of them features)"
        )
        for tensor in item.tensors:
            print(f"    {tensor.name}: {tensor.dtype} {list(tensor.shape)}")
    print("token ids:", " ".join(map(str, plan.prompt_token_ids)))
