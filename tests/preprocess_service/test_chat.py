"""Chat templates: both kinds of content, where templates live, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diptych.service.errors import InvalidInputError
from preprocess_service.planning import Checkpoint
from preprocess_service.requests import Chat, ChatMessage, Media
from tests.tiny_checkpoint import LIST_TEMPLATE, STRING_TEMPLATE, make_checkpoint

IMAGE = Media("image", b"")


def user(*parts: str | Media) -> Chat:
    return Chat((ChatMessage("user", parts),))


def text_of(checkpoint: Checkpoint, ids: list[int]) -> str:
    return checkpoint.tokenizer.decode(ids, skip_special_tokens=False)


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(make_checkpoint(tmp_path_factory.mktemp("lists"), chat_template=LIST_TEMPLATE))


@pytest.fixture(scope="module")
def strings(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(make_checkpoint(tmp_path_factory.mktemp("strings"), chat_template=STRING_TEMPLATE))


def test_list_content(lists: Checkpoint) -> None:
    ids = lists.chat.encode(user(IMAGE, "what is it?"))
    assert text_of(lists, ids) == "<s>USER: <image>\nwhat is it? ASSISTANT:"
    expected = lists.family.ctx.tokenizer("USER: <image>\nwhat is it? ASSISTANT:")["input_ids"]
    assert ids == expected


def test_string_content(strings: Checkpoint) -> None:
    ids = strings.chat.encode(user("a", IMAGE, " b <image> c"))
    # The template puts the beginning-of-text token itself, so none is added.
    assert text_of(strings, ids) == "<s>[user] a<image> b <image> c\n[assistant]"
    assert ids.count(3) == 1


def test_literal_placeholders_survive_the_template(strings: Checkpoint) -> None:
    ids = strings.chat.encode(user("  <image>  "))
    assert 3 not in ids
    assert text_of(strings, ids) == "<s>[user] <image>\n[assistant]"


def test_a_role_cannot_smuggle_a_placeholder(lists: Checkpoint) -> None:
    ids = lists.chat.encode(Chat((ChatMessage("user<image>", ("x",)),)))
    assert 3 not in ids


def test_an_unknown_role(strings: Checkpoint) -> None:
    with pytest.raises(InvalidInputError, match="unknown role <image>") as caught:
        strings.chat.encode(Chat((ChatMessage("<image>", ("x",)),)))
    assert caught.value.stage == "chat"


def test_no_template(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_checkpoint(tmp_path, chat_template=None))
    with pytest.raises(InvalidInputError, match="no chat template") as caught:
        checkpoint.chat.encode(user("x"))
    assert caught.value.stage == "chat"


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.json", "processor_config.json"])
def test_where_templates_live(tmp_path: Path, place: str) -> None:
    make_checkpoint(tmp_path, chat_template=None)
    path = tmp_path / place
    content = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**content, "chat_template": LIST_TEMPLATE}), "utf-8")
    checkpoint = Checkpoint(tmp_path)
    assert text_of(checkpoint, checkpoint.chat.encode(user("hi"))) == "<s>USER: hi ASSISTANT:"


def test_the_sandbox_holds(tmp_path: Path) -> None:
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    checkpoint = Checkpoint(make_checkpoint(tmp_path, chat_template=template))
    with pytest.raises(InvalidInputError, match="refuses the messages"):
        checkpoint.chat.encode(user("x"))
