"""Media sources to bytes: bytes as they are, data URLs decoded strictly; nothing is fetched from anywhere."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Final

from diptych.service.errors import InvalidInputError, LimitExceededError, UnimplementedError
from preprocess_service.requests import Media, MediaHeader

STAGE: Final = "fetch"
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_MAX_SHOWN: Final = 40


def fetch(media: Media, item: int, max_bytes: int) -> bytes | MediaHeader:
    """The item's bytes, or the beginning of them where no more was sent.

    `item` is the item's index, for errors; `max_bytes` bounds the file.
    """
    source = media.source
    if isinstance(source, str):
        source = _read_url(source, item)
    size = source.total_bytes if isinstance(source, MediaHeader) else len(source)
    if size > max_bytes:
        raise LimitExceededError(
            f"item {item} has {size} bytes; at most {max_bytes} are allowed",
            stage=STAGE,
            item=item,
            limit=max_bytes,
            actual=size,
        )
    return source


def _read_url(url: str, item: int) -> bytes:
    scheme = _SCHEME.match(url)
    if scheme is None:
        raise InvalidInputError(f"item {item}: {_shorten(url)!r} is not a URL", stage=STAGE, item=item)
    if (name := scheme[1].lower()) != "data":
        raise UnimplementedError(
            f"item {item}: URLs with scheme {name!r} are not served; send bytes or a data URL",
            stage=STAGE,
            item=item,
            scheme=name,
        )
    return _read_data_url(url[scheme.end() :], item)


def _read_data_url(rest: str, item: int) -> bytes:
    """`image/png;base64,…` without its scheme; only base64 in its strict form."""
    kind, comma, payload = rest.partition(",")
    if not comma or not kind.lower().endswith(";base64"):
        raise InvalidInputError(f"item {item}: a data URL has the form data:image/png;base64,…", stage=STAGE, item=item)
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidInputError(
            f"item {item}: the data URL is not valid base64: {error}", stage=STAGE, item=item
        ) from error


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"
