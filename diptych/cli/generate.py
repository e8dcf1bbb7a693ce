"""Ask for an answer to a prompt with pictures; the text is printed as it comes.

With --address a running preprocess service answers. With --model both services are started on free ports,
answer, and are stopped; then every flag of `diptych executor` is taken too.

examples:
  diptych generate --address 127.0.0.1:50051 --prompt '<image> What is this?' --image cat.jpg --max-tokens 64
  diptych generate --address 127.0.0.1:50051 --chat --prompt '<image><image> Compare.' --image a.jpg --image b.jpg
  diptych generate --model ./llava-1.5-7b-hf --device cpu --prompt 'Hello' --json
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any, Final

from diptych.cli.inputs import add_input_arguments, read_input, read_media
from diptych.cli.output import print_json
from diptych.cli.peer import preprocess_client
from diptych.cli.plan import find_placeholders
from diptych.client.errors import RequestError
from diptych.client.inputs import GenerateOptions
from diptych.client.results import Generation, Logprobs

OPTION_FLAGS: Final = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "logprobs", "prompt_logprobs", "min_tokens",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "stop", "bad_words",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Declare flags; those of the services only where the services are started here."""
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--address", metavar="HOST:PORT", help="ask this preprocess service")
    where.add_argument("--model", metavar="DIR", help="start both services with this checkpoint, ask, stop them")
    add_input_arguments(parser)
    _add_option_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, nothing else")
    if not any(argument.partition("=")[0] == "--address" for argument in arguments):
        from diptych.cli import both

        both.add_arguments(parser, leave_out=("model", "host", "port"))


def _add_option_arguments(parser: argparse.ArgumentParser) -> None:
    """How the answer's tokens are chosen."""
    parser.add_argument("--max-tokens", type=int, metavar="N", help="output tokens at most")
    parser.add_argument("--min-tokens", type=int, metavar="N", help="do not end before this many output tokens")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 is greedy, the default of this command"
    )
    parser.add_argument("--top-p", type=float, metavar="P", help="the likeliest tokens that add up to P")
    parser.add_argument("--top-k", type=int, metavar="K", help="the K likeliest tokens; 0: all")
    parser.add_argument("--min-p", type=float, metavar="P", help="tokens at least P times as likely as the likeliest")
    parser.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1: repeats prompt and output less")
    parser.add_argument("--presence-penalty", type=float, metavar="X", help="above 0: repeats its output less")
    parser.add_argument("--frequency-penalty", type=float, metavar="X", help="the same for every occurrence")
    parser.add_argument(
        "--logit-bias", type=_bias, action="append", metavar="ID=X", help="add X to a token's logit; may be repeated"
    )
    parser.add_argument(
        "--bad-word", dest="bad_words", action="append", metavar="TEXT", help="never write this; may be repeated"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="makes sampling reproducible")
    parser.add_argument("--logprobs", type=int, metavar="K", help="with --json: log probabilities of K tokens each")
    parser.add_argument("--prompt-logprobs", type=int, metavar="K", help="with --json: the same for prompt tokens")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the model's end-of-text token")


def _bias(text: str) -> tuple[int, float]:
    """`42=-1.5` -> (42, -1.5); ValueError for anything else."""
    token_id, _, value = text.partition("=")
    return int(token_id), float(value)


def run(arguments: argparse.Namespace) -> int:
    """Ask and print."""
    read_media(arguments)  # before anything is started: a file that is not there needs no server
    if arguments.address is not None:
        return ask(arguments, arguments.address)
    from diptych.cli.temporary import with_services

    return with_services(arguments, lambda address: ask(arguments, address))


def ask(arguments: argparse.Namespace, address: str) -> int:
    """Send the request; print text as it comes, or one JSON object at the end."""
    with preprocess_client(address) as client:
        prompt = read_input(arguments, find_placeholders(client) if arguments.chat else {})
        generation = Generation()
        try:
            for piece in client.stream(prompt, **_options(arguments)):
                generation.add(piece)
                if not arguments.json and piece.text:
                    sys.stdout.write(piece.text)
                    sys.stdout.flush()
        except RequestError:
            if not arguments.json and generation.text:
                print(flush=True)  # the error gets a line of its own
            raise
    if arguments.json:
        print_json(as_json(generation, arguments.logprobs is not None, arguments.prompt_logprobs is not None))
    else:
        print()
    return 0


def as_json(generation: Generation, has_logprobs: bool, has_prompt_logprobs: bool = False) -> dict[str, object]:
    """The documented JSON form; with `prompt_logprobs` only if they were asked for."""
    final = generation.final
    assert final is not None
    usage = final.usage
    extra = {"prompt_logprobs": _logprobs_as_json(generation.prompt_logprobs)} if has_prompt_logprobs else {}
    return {
        "text": generation.text,
        "token_ids": generation.token_ids,
        "finish_reason": final.finish_reason,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "image_tokens": usage.image_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
        },
        "logprobs": _logprobs_as_json(generation.logprobs) if has_logprobs else None,
        **extra,
    }


def _logprobs_as_json(entries: Sequence[Logprobs]) -> list[dict[str, object]]:
    """One object per token. JSON has no infinity: null is what the model cannot say at all."""
    return [
        {
            "token_id": entry.token_id,
            "logprob": entry.logprob if math.isfinite(entry.logprob) else None,
            "top": [list(pair) for pair in entry.top],
        }
        for entry in entries
    ]


def _options(arguments: argparse.Namespace) -> GenerateOptions:
    options: dict[str, Any] = {name: getattr(arguments, name) for name in OPTION_FLAGS}
    options["logit_bias"] = dict(arguments.logit_bias) if arguments.logit_bias else None
    options["ignore_eos"] = arguments.ignore_eos or None
    given: GenerateOptions = {name: value for name, value in options.items() if value is not None}  # type: ignore[assignment]
    return given
