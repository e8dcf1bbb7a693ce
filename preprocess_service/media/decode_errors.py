"""What decoding of any kind says when it fails."""

from __future__ import annotations

from typing import Final

from PIL import UnidentifiedImageError

from diptych.service.errors import InvalidInputError

STAGE: Final = "decode"


def undecodable(index: int, what: str, error: Exception) -> InvalidInputError:
    """The error of an item whose data is broken; `what` is "JPEG image" or the like."""
    return InvalidInputError(f"item {index}: the {what} cannot be decoded: {_reason(error)}", stage=STAGE, item=index)


def mismatch(index: int, what: str) -> InvalidInputError:
    """The error of an item that decodes to something else than its header promised."""
    return InvalidInputError(f"item {index}: {what}", stage=STAGE, item=index)


def check_picture_size(actual: list[int], promised: list[int], index: int, what: str = "the image") -> None:
    """INVALID_ARGUMENT unless a picture has the size its header promised, both (width, height)."""
    if actual != promised:
        raise mismatch(
            index,
            f"{what} decodes to {actual[0]}x{actual[1]} pixels, its header says {promised[0]}x{promised[1]}",
        )


def _reason(error: Exception) -> str:
    """The error's own text without addresses of objects, which mean nothing to a client."""
    if isinstance(error, UnidentifiedImageError):
        return "its data is not what its header says"
    return str(error) or type(error).__name__
