"""Conversations to token ids with the checkpoint's chat template, rendered in transformers' sandbox."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from jinja2 import TemplateError

from diptych.service.errors import InvalidInputError
from preprocess_service.requests import Chat, ChatMessage, Media
from preprocess_service.tokens import PrivatePlaceholders, TextTokenizer
from preprocess_service.tokens.private import ProtectedTexts
from registry import InputContext
from registry.errors import CheckpointError

STAGE: Final = "chat"
_PROBE_WORD: Final = "diptychprobe"
Content = str | list[dict[str, str]]


class ChatRenderer:
    """Renders conversations for one checkpoint.

    Templates that understand lists of typed parts get them; the others get one string per message, with
    the placeholder texts where media parts are.
    """

    def __init__(
        self, ctx: InputContext, tokenizer: TextTokenizer, placeholder_texts: Mapping[str, str], ids: Mapping[int, str]
    ) -> None:
        """`placeholder_texts`: modality -> its text in prompts; `ids`: placeholder token id -> its text."""
        self._hf_tokenizer = ctx.tokenizer
        self._texts = dict(placeholder_texts)
        self._template = find_template(ctx)
        self._private = PrivatePlaceholders(tokenizer, ids) if ids else None
        self._tokenizer = tokenizer
        self._takes_lists = self._template is not None and self._understands_lists()

    def encode(self, chat: Chat, check: Callable[[str], None] = lambda rendered: None) -> list[int]:
        """Token ids with one placeholder token per media part that the template renders.

        `check` sees the rendered text before it is tokenized, and raises to refuse it.
        """
        if self._template is None:
            raise InvalidInputError(
                "the checkpoint has no chat template; send a prompt instead of chat messages", stage=STAGE
            )
        if self._private is None:
            rendered = self._render(chat, str)
            check(rendered)
            return self._tokenizer.encode(rendered, self._adds_special_tokens(rendered))
        protected = self._private.protected_texts()
        rendered = self._render(chat, protected.protect, protected)
        check(protected.restore(rendered))
        return self._private.encode(rendered, protected, self._adds_special_tokens(rendered))

    def _render(self, chat: Chat, protect: Callable[[str], str], protected: ProtectedTexts | None = None) -> str:
        messages = [
            {"role": protect(message.role), "content": self._content(message, protect)} for message in chat.messages
        ]
        try:
            return self._apply(messages)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            reason = protected.restore(str(error)) if protected else str(error)
            raise InvalidInputError(f"the chat template refuses the messages: {reason}", stage=STAGE) from error

    def _content(self, message: ChatMessage, protect: Callable[[str], str]) -> Content:
        if self._takes_lists:
            return [
                {"type": part.modality} if isinstance(part, Media) else {"type": "text", "text": protect(part)}
                for part in message.parts
            ]
        return "".join(
            self._texts[part.modality] if isinstance(part, Media) else protect(part) for part in message.parts
        )

    def _adds_special_tokens(self, rendered: str) -> bool:
        """As transformers' processors: not if the template has already put the beginning-of-text token."""
        bos = self._hf_tokenizer.bos_token
        return bos is None or not rendered.startswith(bos)

    def _apply(self, messages: list[dict[str, Any]]) -> str:
        rendered: str = self._hf_tokenizer.apply_chat_template(
            messages, chat_template=self._template, tokenize=False, add_generation_prompt=True
        )
        return rendered

    def _understands_lists(self) -> bool:
        """Whether a list of parts renders as its text, with one placeholder per media part."""
        parts = [{"type": modality} for modality in self._texts]
        content = [*parts, {"type": "text", "text": _PROBE_WORD}]
        try:
            rendered = self._apply([{"role": "user", "content": content}])
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError):
            return False
        if _PROBE_WORD not in rendered or "'type'" in rendered or '"type"' in rendered:
            return False
        return all(text in rendered for text in self._texts.values())


def find_template(ctx: InputContext) -> str | None:
    """The checkpoint's default chat template: the processor's over the tokenizer's; None without any."""
    in_config = ctx.processor_config.get("chat_template")
    for template in (in_config, _read_jinja(ctx), _read_json(ctx), ctx.tokenizer.chat_template):
        chosen = template.get("default") if isinstance(template, dict) else template
        if chosen:
            return str(chosen)
    return None


def _read_jinja(ctx: InputContext) -> str | None:
    path = ctx.model_dir / "chat_template.jinja"
    return path.read_text("utf-8") if path.is_file() else None


def _read_json(ctx: InputContext) -> Any:
    path = ctx.model_dir / "chat_template.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text("utf-8"))["chat_template"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a JSON object with a chat_template: {error}") from error
