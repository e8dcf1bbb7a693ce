"""Flags that describe a prompt with pictures, for `generate` and `plan`."""

from __future__ import annotations

import argparse

from diptych.client.inputs import Chat, Media, Prompt


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """--prompt, --chat, --image."""
    parser.add_argument(
        "--prompt", required=True, metavar="TEXT", help='the text, with one placeholder ("<image>") per --image'
    )
    parser.add_argument(
        "--chat", action="store_true", help="send the prompt as a user's turn through the checkpoint's chat template"
    )
    parser.add_argument(
        "--image", action="append", default=[], metavar="PATH", help="a picture; may be given several times, in order"
    )


def read_input(arguments: argparse.Namespace, placeholder: str | None) -> Prompt | Chat:
    """The prompt or chat of the flags; `placeholder` is the model's text for a picture, where it takes any.

    RequestError NOT_FOUND for a picture that is not there.
    """
    media = read_images(arguments)
    if not arguments.chat:
        return Prompt(arguments.prompt, media)
    if placeholder is None:
        return Chat.from_prompt(arguments.prompt, media, "\0")
    return Chat.from_prompt(arguments.prompt, media, placeholder)


def read_images(arguments: argparse.Namespace) -> list[Media]:
    """The pictures; RequestError NOT_FOUND for one that is not there."""
    return [Media.file(path) for path in arguments.image]
