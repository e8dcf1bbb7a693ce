"""Between text and token ids: encoding, private placeholders, incremental detokenization, stop strings."""

from preprocess_service.tokens.detokenizer import IncrementalDetokenizer
from preprocess_service.tokens.private import PrivatePlaceholders
from preprocess_service.tokens.stop_strings import StopStrings
from preprocess_service.tokens.tokenizer import TextTokenizer

__all__ = ["IncrementalDetokenizer", "PrivatePlaceholders", "StopStrings", "TextTokenizer"]
