"""How much text one token can stand for: a text with more bytes than that has more tokens than a limit allows.

Known only where no text can vanish before it is cut into tokens, and every byte has a token: then the tokens
of a text, each at most so long, add up to all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

_KEEPING: Final = frozenset({"ByteLevel", "Digits", "Metaspace", "Punctuation", "Split", "UnicodeScripts"})
"""Pre-tokenizers that cut a text without losing any of it, unless their behaviour is "Removed"."""


def max_bytes_per_token(tokenizer: dict[str, Any]) -> int | None:
    """Bytes of UTF-8 that a token stands for at most, from a tokenizer.json; None where that is not certain."""
    model, normalizer, added = tokenizer["model"], tokenizer["normalizer"], tokenizer["added_tokens"]
    if model["type"] != "BPE" or not _knows_every_byte(tokenizer):
        return None
    if not all(_keeps_length(step) for step in _steps(normalizer, "normalizers")):
        return None
    if not all(_keeps_text(step) for step in _steps(tokenizer["pre_tokenizer"], "pretokenizers")):
        return None
    # These swallow the blanks around them, or text that only becomes theirs by normalizing.
    if any(token["lstrip"] or token["rstrip"] or (token["normalized"] and normalizer) for token in added):
        return None
    return max(len(text.encode("utf-8")) for text in (*model["vocab"], *(token["content"] for token in added)))


def _knows_every_byte(tokenizer: dict[str, Any]) -> bool:
    """Whether no piece of text lacks a token: unknown text is dropped, or melts into one token."""
    model = tokenizer["model"]
    vocabulary = model["vocab"]
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return False  # then the bytes are looked up under other names
    if any(step["type"] == "ByteLevel" for step in _steps(tokenizer["pre_tokenizer"], "pretokenizers")):
        return sum(len(token) == 1 and token in BYTE_OF_CHARACTER for token in vocabulary) == len(BYTE_OF_CHARACTER)
    has_bytes = all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    return bool(model.get("byte_fallback")) and has_bytes


def _keeps_length(normalizer: dict[str, Any]) -> bool:
    """Whether a normalizer's output is never shorter than its input."""
    if normalizer["type"] == "Replace":
        replaced = normalizer["pattern"].get("String")
        return replaced is not None and len(normalizer["content"].encode()) >= len(replaced.encode())
    return bool(normalizer["type"] == "Prepend")


def _keeps_text(pre_tokenizer: dict[str, Any]) -> bool:
    return pre_tokenizer["type"] in _KEEPING and pre_tokenizer.get("behavior") != "Removed"


def _steps(step: dict[str, Any] | None, key: str) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, those of sequences one by one."""
    if step is None:
        return
    if step["type"] != "Sequence":
        yield step
        return
    for inner in step[key]:
        yield from _steps(inner, key)


def _byte_of_character() -> dict[str, int]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTE_OF_CHARACTER: Final = _byte_of_character()
"""The byte that each character of a byte-level token stands for (GPT-2's table)."""
