"""Placeholders that no text can spell: what tells a media part from the literal text "<image>".

A second tokenizer differs from the checkpoint's in the names of the placeholder tokens alone: they are
private random strings. In it "<image>" is ordinary text, segmented like any other, and the private string is
the placeholder token.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Any, Final

from tokenizers import Tokenizer

from preprocess_service.tokens.tokenizer import PROBE_TEXTS, TextTokenizer, encode_text
from registry.errors import CheckpointError

_PRIVATE_BYTES: Final = 16


class ProtectedTexts:
    """Stands in for placeholder texts inside a client's text while the chat template is rendered.

    A text that ends in the beginning of a placeholder is protected too: the template may put the rest of it
    right behind.
    """

    def __init__(self, placeholders: Iterable[str]) -> None:
        texts = sorted(placeholders, key=len, reverse=True)
        beginnings = {text[:length] for text in texts for length in range(1, len(text))}
        whole = "|".join(map(re.escape, texts))
        ends = "|".join(map(re.escape, sorted(beginnings, key=len, reverse=True)))
        self._pattern = re.compile(rf"{whole}|(?:{ends})\Z" if ends else whole)
        self._key = secrets.token_hex(_PRIVATE_BYTES)
        self._literals: list[str] = []

    def protect(self, text: str) -> str:
        """`text` with every placeholder text replaced by a sentinel."""
        return self._pattern.sub(self._sentinel, text)

    def restore(self, text: str) -> str:
        """`text` with every sentinel turned back into what it stands for."""
        if not self._literals:
            return text
        return re.sub(f"{self._key}q([0-9]+)q", lambda found: self._literals[int(found[1])], text)

    def _sentinel(self, found: re.Match[str]) -> str:
        self._literals.append(found[0])
        return f"{self._key}q{len(self._literals) - 1}q"


class PrivatePlaceholders:
    """The checkpoint's tokenizer with its placeholder tokens renamed."""

    def __init__(self, tokenizer: TextTokenizer, placeholders: Mapping[int, str]) -> None:
        """`placeholders`: token id -> its text in prompts."""
        self._texts = dict(placeholders)
        self._names = {text: secrets.token_hex(_PRIVATE_BYTES) for text in placeholders.values()}
        renamed = _rename(json.loads(tokenizer.to_json()), self._names)
        self._backend: Any = Tokenizer.from_str(json.dumps(renamed))
        self._pattern = re.compile("|".join(map(re.escape, sorted(self._names, key=len, reverse=True))))
        self._verify(tokenizer)

    def protected_texts(self) -> ProtectedTexts:
        """Sentinels for one request."""
        return ProtectedTexts(self._names)

    def encode(self, rendered: str, protected: ProtectedTexts, add_special_tokens: bool) -> list[int]:
        """Token ids of a rendered chat: its own placeholders are tokens, the protected texts ordinary text."""
        named = self._pattern.sub(lambda found: self._names[found[0]], rendered)
        return encode_text(self._backend, protected.restore(named), add_special_tokens)

    def _verify(self, tokenizer: TextTokenizer) -> None:
        """CheckpointError unless renaming changed the placeholders alone."""
        for token_id, text in self._texts.items():
            for template in ("{}", "a {} b", "{}\n{}", "\n{}x"):
                probe = template.replace("{}", text)
                expected = tokenizer.encode(probe)
                if token_id not in expected:
                    raise CheckpointError(f"the tokenizer does not make token {token_id} of its text {text!r}")
                if self.encode(probe, self.protected_texts(), True) != expected:
                    raise CheckpointError(f"the placeholder {text!r} of the tokenizer cannot be renamed")
            literal = self.protected_texts()
            if token_id in self.encode(literal.protect(f"a {text} b"), literal, True):
                raise CheckpointError(f"the tokenizer makes token {token_id} of the ordinary text {text!r}")
        for probe in PROBE_TEXTS:
            if self.encode(probe, self.protected_texts(), True) != tokenizer.encode(probe):
                raise CheckpointError(f"renaming the placeholders changes the token ids of {probe!r}")


def _rename(tokenizer: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A tokenizer.json with tokens renamed, among the added tokens and in the model's vocabulary."""
    for token in tokenizer.get("added_tokens", []):
        token["content"] = names.get(token["content"], token["content"])
    model = tokenizer["model"]
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(token, token): token_id for token, token_id in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[names.get(token, token), *rest] for token, *rest in vocabulary]
    return tokenizer
