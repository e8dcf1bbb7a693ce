"""Token ids to text, one token at a time, in whole characters.

`tokenizers.decoders.DecodeStream` does nearly this, but it raises on runs of byte tokens that turn out not
to be UTF-8 (random weights produce them all the time), and it holds text back for as long as it ends in such
bytes. The window technique is the same.
"""

from __future__ import annotations

from preprocess_service.tokens.tokenizer import TextTokenizer


class IncrementalDetokenizer:
    """The text of a growing list of token ids; special tokens are left out.

    Only the beginning of a character that later tokens may complete is held back. The pieces joined are
    `decode(all ids)`, without a character that is incomplete at the very end.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        # Tokens that may still shape the text of the next one: those of the last piece, then the pending ones.
        self._window: list[int] = []
        self._num_given = 0
        self._given_text = ""

    def step(self, token_id: int) -> str:
        """The new text that one more token completes; may be empty."""
        if self._tokenizer.is_silent(token_id):
            return ""
        self._window.append(token_id)
        if self._tokenizer.num_incomplete(self._window):
            return ""
        text = self._tokenizer.decode(self._window)
        piece = text[len(self._given_text) :]
        del self._window[: self._num_given]
        self._num_given = len(self._window)
        self._given_text = self._tokenizer.decode(self._window)
        return piece

    def finish(self) -> str:
        """What is still pending, without the incomplete last character."""
        rest = self._tokenizer.decode(self._window)[len(self._given_text) :]
        num_incomplete = self._tokenizer.num_incomplete(self._window)
        return rest[: len(rest) - num_incomplete]
