"""The checkpoint's tokenizer, for many threads at once."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

from tokenizers import Tokenizer

from preprocess_service.tokens.bound import BYTE_OF_CHARACTER, max_bytes_per_token
from registry.errors import CheckpointError

PROBE_TEXTS: Final = (
    "",
    "Hello, world!",
    "  two  spaces\n\nand\ttabs ",
    "Größe 図書館 👩‍👩‍👧 é — 42 %",
    "USER: what is in the picture? ASSISTANT:",
    "def f(x):\n    return x ** 2  # <tag> </tag>",
)
"""Texts on which tokenizers are compared at boot."""
_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CHARACTER_BYTES: Final = 4
_LONG_TEXT: Final = 4096
"""Characters from which on it pays to let other threads run meanwhile."""
_MANY_IDS: Final = 4096


class TextTokenizer:
    """Encodes and decodes exactly as the transformers tokenizer it is made from.

    It works on a copy of the underlying tokenizer: transformers changes its own while encoding (padding,
    truncation), which other threads must not see. `max_bytes_per_token`: bytes of text that a token stands
    for at most; None where the tokenizer may lose text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend: Any = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        added = self._backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        description = json.loads(self.to_json())
        self.max_bytes_per_token = max_bytes_per_token(description)
        decoders = set(_decoder_types(description["decoder"]))
        self._is_byte_level = "ByteLevel" in decoders
        self._has_byte_fallback = "ByteFallback" in decoders
        self._verify(tokenizer)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, as `tokenizer(text)["input_ids"]`."""
        return encode_text(self._backend, text, add_special_tokens)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
        if len(token_ids) <= _MANY_IDS:
            text: str = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        else:
            (text,) = self._backend.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)
        return text

    def is_silent(self, token_id: int) -> bool:
        """Whether a token has no text: special tokens and ids without a token."""
        return token_id in self._special_ids or self._backend.id_to_token(token_id) is None

    def num_incomplete(self, token_ids: Sequence[int]) -> int:
        """How many U+FFFD at the end of the tokens' text are the beginning of a character that may yet come."""
        data = b"".join(self._bytes_of(token_id) for token_id in token_ids[-_CHARACTER_BYTES:])
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(data)
        num_bytes = len(decoder.getstate()[0])
        # The byte-level decoder replaces half a character as one, the byte-fallback decoder each of its bytes.
        return min(num_bytes, 1) if self._is_byte_level else num_bytes

    def to_json(self) -> str:
        """The tokenizer in the format of tokenizer.json."""
        text: str = self._backend.to_str()
        return text

    def _bytes_of(self, token_id: int) -> bytes:
        token: str = self._backend.id_to_token(token_id)
        if self._is_byte_level:
            table = BYTE_OF_CHARACTER
            return bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()
        if self._has_byte_fallback and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        return token.encode()

    def _verify(self, tokenizer: Any) -> None:
        for text in PROBE_TEXTS:
            if self.encode(text) != tokenizer(text)["input_ids"]:
                raise CheckpointError(
                    f"{type(tokenizer).__name__} does more than its tokenizer.json says: the two give different "
                    f"token ids for {text!r}"
                )


def encode_text(backend: Any, text: str, add_special_tokens: bool) -> list[int]:
    """Token ids of a text. `encode` holds the interpreter until it is done, so long texts go the way of batches."""
    if len(text) <= _LONG_TEXT:
        encoding = backend.encode(text, add_special_tokens=add_special_tokens)
    else:
        (encoding,) = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    ids: list[int] = encoding.ids
    return ids


def _decoder_types(decoder: dict[str, Any] | None) -> Iterator[str]:
    """Names of a tokenizer.json's decoders, nested ones included."""
    if decoder is not None:
        yield decoder["type"]
        for inner in decoder.get("decoders", []):
            yield from _decoder_types(inner)
