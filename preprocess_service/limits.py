"""What one request may hold at most, said in numbers that are known before anything is built or tokenized.

The limits on media are the registry's (`MediaLimits`); these are the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from diptych.service.errors import InvalidInputError, LimitExceededError

STAGE: Final = "admit"
DEFAULT_MAX_PROMPT_BYTES: Final = 4 * 1024 * 1024
MAX_MESSAGES: Final = 4096
MAX_PARTS: Final = 16384
MAX_ROLE_LENGTH: Final = 64
MAX_DETOKENIZED: Final = 1024 * 1024
MAX_STOP_STRINGS: Final = 16
MAX_STOP_LENGTH: Final = 256
MAX_BAD_WORDS: Final = 128
MAX_BAD_WORD_LENGTH: Final = 128
"""Characters. A word of that length, all of them four bytes long, still fits a token sequence's limit."""
_NUM_ITEMS_LOOKED_AT: Final = 64
"""So many items are always told apart by modality, for the error that names the modality's own limit."""


def check_count(what: str, actual: int, limit: int) -> None:
    """LimitExceededError in stage "admit" if there are too many; `what` has {} where the number goes."""
    if actual > limit:
        raise LimitExceededError(
            f"{what.format(actual)}; at most {limit} are allowed", stage=STAGE, limit=limit, actual=actual
        )


def check_num_items(actual: int, limit: int) -> None:
    """LimitExceededError for many more media items than all modalities' limits together, without a look at any."""
    if actual > _NUM_ITEMS_LOOKED_AT:
        check_count("the prompt has {} media items", actual, limit)


def check_text_size(what: str, num_bytes: int, limit: int) -> None:
    """LimitExceededError for a text that is larger than the operator allows."""
    if num_bytes > limit:
        raise LimitExceededError(
            f"{what} has {num_bytes} bytes of text; at most {limit} are allowed (--max-prompt-bytes)",
            stage=STAGE,
            limit=limit,
            actual=num_bytes,
        )


def check_texts(field: str, what: str, texts: Sequence[str], max_texts: int, max_length: int) -> None:
    """Number and length of short texts, such as stop strings; `what` names one of them."""
    check_count(f"{field} has {{}} texts", len(texts), max_texts)
    for text in texts:
        if not text:
            raise InvalidInputError(f"a {what} is empty", stage=STAGE, limit=1, actual=0, field=field)
        check_count(f"a {what} has {{}} characters", len(text), max_length)


def num_text_bytes(text: str) -> int:
    """Bytes of a text as UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
