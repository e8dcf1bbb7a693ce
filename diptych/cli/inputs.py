"""Flags that describe a prompt with media, for `generate` and `plan`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from typing import Final

from diptych.client.inputs import Chat, Media, Prompt

FLAGS: Final = {"image": "a picture", "video": "a video (GIF, WebP, MP4)", "audio": "a sound (WAV, FLAC, OGG)"}


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """--prompt, --chat, and a flag for each modality."""
    parser.add_argument(
        "--prompt", required=True, metavar="TEXT", help='the text, with one placeholder ("<image>") per item'
    )
    parser.add_argument(
        "--chat", action="store_true", help="send the prompt as a user's turn through the checkpoint's chat template"
    )
    for modality, what in FLAGS.items():
        parser.add_argument(
            f"--{modality}",
            dest="media",
            type=partial(_of_modality, modality),
            action="append",
            default=[],
            metavar="PATH",
            help=f"{what}; may be given several times, in the order of the placeholders",
        )


def read_input(arguments: argparse.Namespace, placeholders: Mapping[str, str]) -> Prompt | Chat:
    """The prompt or chat of the flags; `placeholders`: modality -> the model's text for an item, for chats.

    RequestError NOT_FOUND for a file that is not there.
    """
    media = read_media(arguments)
    if not arguments.chat:
        return Prompt(arguments.prompt, media)
    return Chat.from_prompt(arguments.prompt, media, placeholders)


def read_media(arguments: argparse.Namespace) -> list[Media]:
    """The items; RequestError NOT_FOUND for a file that is not there."""
    return [Media.file(path, modality) for modality, path in arguments.media]


def _of_modality(modality: str, path: str) -> tuple[str, str]:
    return modality, path
