"""How much text one token can stand for, and that long texts are tokenized like short ones."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from preprocess_service.planning import Checkpoint
from preprocess_service.tokens.bound import max_bytes_per_token
from preprocess_service.tokens.tokenizer import encode_text
from tests.tiny_checkpoint import make_tokenizer

BYTE_LEVEL = make_tokenizer(592)


def sentencepiece_like() -> Tokenizer:
    """As converted from SentencePiece: blanks become bars, unknown characters bytes."""
    words = ["\u2581", "\u2581\u2581", "t", "h", "e", "th", "the", "\u2581the", "c", "\u00e9"]
    vocabulary = {token: i for i, token in enumerate(["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *words])}
    merges = [("\u2581", "\u2581"), ("t", "h"), ("th", "e"), ("\u2581", "the")]
    one = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    one.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    one.decoder = decoders.ByteFallback()
    one.add_special_tokens([AddedToken("<image>", normalized=False)])
    return one


def described(tokenizer: Tokenizer) -> dict[str, Any]:
    description: dict[str, Any] = json.loads(tokenizer.to_str())
    return description


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, sentencepiece_like()], ids=["byte-level", "byte fallback"])
def test_no_text_has_fewer_tokens_than_the_bound_says(tokenizer: Tokenizer) -> None:
    longest = max_bytes_per_token(described(tokenizer))
    assert longest is not None

    @given(st.text(st.one_of(st.sampled_from(" the<image>\u2581\n"), st.characters(codec="utf-8")), max_size=60))
    @settings(max_examples=500)
    def check(text: str) -> None:
        assert len(encode_text(tokenizer, text, False)) * longest >= len(text.encode())

    check()
    for text in ("<image>" * 50, " the" * 50, "\u2581" * 50, " " * 50):
        assert len(encode_text(tokenizer, text, False)) * longest >= len(text.encode())


def set_model(**values: object) -> Callable[[dict[str, Any]], None]:
    return lambda description: description["model"].update(values)


def set_added(**values: object) -> Callable[[dict[str, Any]], None]:
    return lambda description: description["added_tokens"][3].update(values)


def lose_a_byte(description: dict[str, Any]) -> None:
    del description["model"]["vocab"]["!"]


def normalize(**normalizer: object) -> Callable[[dict[str, Any]], None]:
    return lambda description: description.update(normalizer=normalizer)


def cut(**step: object) -> Callable[[dict[str, Any]], None]:
    def change(description: dict[str, Any]) -> None:
        description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [step, description["pre_tokenizer"]]}

    return change


LOSING: dict[str, Callable[[dict[str, Any]], None]] = {
    "whole words": set_model(type="WordPiece"),
    "prefixed pieces": set_model(continuing_subword_prefix="##"),
    "unknown bytes": lose_a_byte,
    "an added token that eats blanks": set_added(lstrip=True),
    "stripped text": normalize(type="Strip", strip_left=True, strip_right=True),
    "composed characters": normalize(type="NFC"),
    "text that shrinks": normalize(type="Replace", pattern={"String": "  "}, content=" "),
    "a pattern of any length": normalize(type="Replace", pattern={"Regex": " +"}, content=" "),
    "one step of several": normalize(type="Sequence", normalizers=[{"type": "Lowercase"}]),
    "dropped blanks": cut(type="WhitespaceSplit"),
    "dropped separators": cut(type="Split", pattern={"String": "-"}, behavior="Removed", invert=False),
}


@pytest.mark.parametrize("kind", LOSING)
def test_nothing_is_said_where_text_may_vanish(kind: str) -> None:
    description = copy.deepcopy(described(BYTE_LEVEL))
    assert max_bytes_per_token(description)
    LOSING[kind](description)
    assert max_bytes_per_token(description) is None


def test_byte_fallback_without_every_byte_says_nothing() -> None:
    description = described(sentencepiece_like())
    del description["model"]["vocab"]["<0x41>"]
    assert max_bytes_per_token(description) is None
    description = described(sentencepiece_like())
    description["added_tokens"][0]["normalized"] = True
    assert max_bytes_per_token(description) is None


@given(st.text(st.one_of(st.sampled_from(" the<image>1\u2581\n"), st.characters(codec="utf-8")), max_size=80))
@settings(max_examples=30)
def test_long_texts_have_the_ids_of_plain_encoding(part: str) -> None:
    text = part * (5000 // max(len(part), 1) + 1)
    for tokenizer in (BYTE_LEVEL, sentencepiece_like()):
        for adds in (True, False):
            assert encode_text(tokenizer, text, adds) == tokenizer.encode(text, add_special_tokens=adds).ids


def test_many_ids_are_decoded_like_few(checkpoint: Checkpoint) -> None:
    ids = list(range(590)) * 10
    few = checkpoint.tokenizer.decode(ids[: 4 * 590], False)
    assert checkpoint.tokenizer.decode(ids, False).startswith(few[:-4])
    whole = checkpoint.tokenizer.decode(ids)
    assert whole == checkpoint.tokenizer._backend.decode(ids)


def test_the_demo_models_tokenizer_has_a_bound() -> None:
    path = Path(__file__).parents[2] / "demo" / "model" / "tokenizer.json"
    assert max_bytes_per_token(json.loads(path.read_text("utf-8")))
