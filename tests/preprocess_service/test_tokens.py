"""Tokenizing, private placeholders, incremental detokenization and stop strings."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from preprocess_service.tokens import IncrementalDetokenizer, PrivatePlaceholders, StopStrings, TextTokenizer
from registry.errors import CheckpointError
from tests.tiny_checkpoint import make_checkpoint

TEXTS = ("Hello there", "Größe 図書館 👩‍👩‍👧 e\u0301!", " leading and trailing ", "x\n\ny\t\0z", "\ufffd")


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(make_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="module")
def tokenizer(hf: PreTrainedTokenizerFast) -> TextTokenizer:
    return TextTokenizer(hf)


@pytest.fixture(scope="module")
def fallback() -> TextTokenizer:
    """A SentencePiece-like tokenizer: words with a leading bar, bytes for everything else."""
    vocabulary = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256))]
    vocabulary += [(f"\u2581{word}", -3.0) for word in ("the", "cat", "")] + [(letter, -5.0) for letter in "abcdefg"]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


def pieces_of(tokenizer: TextTokenizer, ids: list[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer)
    return [*(detokenizer.step(token_id) for token_id in ids), detokenizer.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_transformers(hf: PreTrainedTokenizerFast, tokenizer: TextTokenizer, text: str) -> None:
    assert tokenizer.encode(text) == hf(text)["input_ids"]
    assert tokenizer.encode(text, False) == hf(text, add_special_tokens=False)["input_ids"]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == hf.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_in_whole_characters(tokenizer: TextTokenizer, fallback: TextTokenizer, text: str) -> None:
    for one in (tokenizer, fallback):
        ids = one.encode(text)
        pieces = pieces_of(one, ids)
        assert "".join(pieces) == one.decode(ids)
        if "\ufffd" not in text:
            assert all("\ufffd" not in piece for piece in pieces)


def test_a_character_of_four_tokens_comes_at_once(tokenizer: TextTokenizer) -> None:
    bytes_of_cat = tokenizer.encode("\U0001f408", False)
    assert len(bytes_of_cat) > 1
    assert pieces_of(tokenizer, bytes_of_cat) == [""] * (len(bytes_of_cat) - 1) + ["\U0001f408", ""]
    assert pieces_of(tokenizer, bytes_of_cat[:-1]) == [""] * len(bytes_of_cat)


@given(st.lists(st.integers(0, 591), max_size=60))
@settings(max_examples=300)
def test_random_ids_give_the_text_of_all_of_them(tokenizer: TextTokenizer, ids: list[int]) -> None:
    whole = tokenizer.decode(ids)
    joined = "".join(pieces_of(tokenizer, ids))
    assert joined == whole or (whole.startswith(joined) and whole[len(joined) :] == "\ufffd")


@given(st.lists(st.integers(0, 270), max_size=60), st.text(max_size=20))
@settings(max_examples=300)
def test_no_ids_break_the_byte_fallback(fallback: TextTokenizer, noise: list[int], text: str) -> None:
    """A text comes out whole, piece by piece; of bytes that are none, every piece is text all the same."""
    ids = fallback.encode(text, False)
    assert "".join(pieces_of(fallback, ids)) == fallback.decode(ids)
    for piece in pieces_of(fallback, noise):
        assert piece.encode().decode() == piece
    whole = fallback.decode(noise)
    assert "\ufffd" in whole or "".join(pieces_of(fallback, noise)) == whole


def test_special_tokens_and_unknown_ids_have_no_text(tokenizer: TextTokenizer) -> None:
    hello = tokenizer.encode("Hello", False)
    assert "".join(pieces_of(tokenizer, [1, *hello, 2, 2, 3, 599, 10**6, *hello])) == "HelloHello"


def test_long_runs_of_invalid_bytes_stay_fast(tokenizer: TextTokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer)
    stray = next(i for i in range(4, 300) if tokenizer.decode([i]) == "\ufffd" and not tokenizer.num_incomplete([i]))
    assert [detokenizer.step(stray) for _ in range(20_000)] == ["\ufffd"] * 20_000


def test_a_long_answer_is_not_decoded_again_for_every_token(tokenizer: TextTokenizer, monkeypatch) -> None:
    detokenizer, lengths = IncrementalDetokenizer(tokenizer), list[int]()
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, *rest: (lengths.append(len(ids)), decode(ids, *rest))[1])
    for token_id in tokenizer.encode("Hello there, hello again. ", False) * 40:
        detokenizer.step(token_id)
    assert 0 < max(lengths) < 10


# --- stop strings ---------------------------------------------------------------------------------


def reference(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Character by character: the stop string that is complete first, the longest at the same place."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    st.lists(st.text("abc", max_size=5), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
)
@settings(max_examples=500)
def test_stop_strings_never_leak(pieces: list[str], stops: list[str]) -> None:
    expected, matched = reference("".join(pieces), stops)
    stopper = StopStrings(stops)
    given_out = ""
    for piece in pieces:
        given_out += stopper.feed(piece)
        # At any moment, what was given out is a beginning of the final text.
        assert expected.startswith(given_out)
        if stopper.matched:
            break
    else:
        given_out += stopper.finish()
    assert (given_out, stopper.matched) == (expected, matched)


@given(st.lists(st.tuples(st.text("abc", max_size=4), st.booleans())), st.lists(st.text("abc", min_size=1, max_size=4)))
def test_skipped_text_completes_no_stop_string(pieces: list[tuple[str, bool]], stops: list[str]) -> None:
    """Only a stop string whose last character is in fed text counts, wherever it began."""
    text = "".join(piece for piece, _ in pieces)
    counts = [is_fed for piece, is_fed in pieces for _ in piece]
    expected, found = text, None
    for end in range(1, len(text) + 1):
        if counts[end - 1] and (ending := [stop for stop in stops if text[:end].endswith(stop)]):
            found = max(ending, key=len)
            expected = text[: end - len(found)]
            break
    stopper = StopStrings(stops)
    given_out = ""
    for piece, is_fed in pieces:
        given_out += stopper.feed(piece) if is_fed else stopper.skip(piece)
        if stopper.matched:
            break
    else:
        given_out += stopper.finish()
    assert (given_out, stopper.matched) == (expected, found)


def test_text_is_held_back_only_while_it_may_be_a_stop_string() -> None:
    stopper = StopStrings(["</s>", "STOP"])
    assert stopper.feed("a</") == "a"
    assert stopper.feed("b") == "</b"
    assert stopper.feed("ST") == ""
    assert stopper.finish() == "ST"


# --- private placeholders -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def private(tokenizer: TextTokenizer) -> PrivatePlaceholders:
    return PrivatePlaceholders(tokenizer, {3: "<image>"})


def test_a_literal_placeholder_is_ordinary_text(tokenizer: TextTokenizer, private: PrivatePlaceholders) -> None:
    protected = private.protected_texts()
    rendered = f"USER: <image>\n{protected.protect('the <image> tag, <image><image>')} ASSISTANT:"
    ids = private.encode(rendered, protected, True)
    assert ids.count(3) == 1
    assert tokenizer.decode(ids, False) == "<s>USER: <image>\nthe <image> tag, <image><image> ASSISTANT:"


def test_a_placeholder_cut_over_two_texts_is_ordinary_text(
    tokenizer: TextTokenizer, private: PrivatePlaceholders
) -> None:
    for cut in range(1, len("<image>")):
        protected = private.protected_texts()
        rendered = protected.protect("see " + "<image>"[:cut]) + protected.protect("<image>"[cut:])
        ids = private.encode(rendered, protected, False)
        assert 3 not in ids
        assert tokenizer.decode(ids) == "see <image>"


@given(st.text(max_size=40))
@settings(max_examples=200)
def test_other_text_is_segmented_as_ever(tokenizer: TextTokenizer, private: PrivatePlaceholders, text: str) -> None:
    protected = private.protected_texts()
    if "<image>" not in text:
        assert private.encode(protected.protect(text), protected, True) == tokenizer.encode(text)


def test_a_sentinel_in_an_error_text_is_turned_back(private: PrivatePlaceholders) -> None:
    protected = private.protected_texts()
    assert protected.restore(f"bad: {protected.protect('<image> x')}") == "bad: <image> x"


def test_a_placeholder_that_is_no_token_is_refused(tokenizer: TextTokenizer) -> None:
    with pytest.raises(CheckpointError, match="does not make token 5 of its text"):
        PrivatePlaceholders(tokenizer, {5: "<nothing>"})


def test_a_placeholder_outside_the_model_vocabulary_keeps_its_id(tmp_path: Path) -> None:
    """Checkpoints often add the placeholder behind the vocabulary of the language model."""
    make_checkpoint(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    size = len(content["model"]["vocab"])
    content["added_tokens"].append({**content["added_tokens"][3], "id": size, "content": "<picture>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    tokenizer = TextTokenizer(AutoTokenizer.from_pretrained(tmp_path))
    assert tokenizer.encode("<picture>", False) == [size]
    private = PrivatePlaceholders(tokenizer, {size: "<picture>"})
    protected = private.protected_texts()
    ids = private.encode("<picture>" + protected.protect("<picture>") + "<image>", protected, False)
    assert ids[0] == size
    assert ids.count(size) == 1
    assert ids[-1] == 3


def test_encoding_from_many_threads(tokenizer: TextTokenizer) -> None:
    from concurrent.futures import ThreadPoolExecutor

    texts = ["".join(random.Random(seed).choices("abc <image>", k=200)) for seed in range(64)]
    expected = [tokenizer.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer.encode, texts)) == expected
