"""Words that an answer shall not spell, as the token sequences that an executor understands."""

from __future__ import annotations

from dataclasses import replace

from diptych.service.errors import InvalidInputError
from diptych.service.sampling import check_sampling
from diptych.v1 import tensor_pb2
from preprocess_service.planning import Checkpoint
from preprocess_service.requests import GenerateCall
from preprocess_service.tokens import TextTokenizer


def with_bad_words(call: GenerateCall, checkpoint: Checkpoint) -> GenerateCall:
    """The call with the token sequences of its words in `sampling.bad_words`, behind those that were there.

    InvalidInputError if that makes too many of them.
    """
    if not call.bad_words:
        return call
    sequences = {sequence: None for word in call.bad_words for sequence in spellings(checkpoint.tokenizer, word)}
    sampling = tensor_pb2.SamplingParams()
    sampling.CopyFrom(call.sampling)
    sampling.bad_words.extend(tensor_pb2.TokenSequence(token_ids=sequence) for sequence in sequences)
    check_sampling(sampling, vocab_size=checkpoint.family.ctx.vocab_size)
    return replace(call, sampling=sampling)


def spellings(tokenizer: TextTokenizer, word: str) -> list[tuple[int, ...]]:
    """The word's token ids at the beginning of a text and, with a space in front, within one.

    InvalidInputError for a word that the tokenizer makes nothing of.
    """
    bare = word.lstrip(" ") or word
    found = dict.fromkeys(tuple(tokenizer.encode(text, add_special_tokens=False)) for text in (bare, f" {bare}"))
    found.pop((), None)
    if not found:
        raise InvalidInputError(f"the bad word {word!r} has no tokens", stage="admit", field="bad_words")
    return list(found)
