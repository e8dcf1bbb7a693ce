"""The half of a request that needs no pixels: fetch, probe, render, tokenize, lay out and expand.

It runs in the service and, for `diptych plan --model`, in the command itself.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from diptych.service.errors import InvalidInputError, LimitExceededError, UnimplementedError
from diptych.service.media_errors import from_media_error
from preprocess_service.chat import ChatRenderer
from preprocess_service.limits import DEFAULT_MAX_PROMPT_BYTES, check_text_size, num_text_bytes
from preprocess_service.media.probe import Probed, Prober
from preprocess_service.media.sources import fetch
from preprocess_service.requests import Chat, Media, MediaHeader, Plan, PlannedItem, Prompt
from preprocess_service.tokens import TextTokenizer
from registry import MediaInfo, MediaLimits, PlaceholderRange, ProcessorInputs
from registry.errors import MediaError, UnknownModalityError
from registry.families import open_family
from registry.family import ModelFamily
from registry.fingerprint import Fingerprint, fingerprint

DEFAULT_MAX_MEDIA_BYTES: Final = 64 * 1024 * 1024


@dataclass(frozen=True)
class RequestLimits:
    """What one request may be. `max_model_len` bounds prompt and output tokens; None: not known."""

    media: MediaLimits = field(default_factory=MediaLimits)
    max_model_len: int | None = None

    def max_items(self, modalities: Iterable[str]) -> int:
        """Media items of all these modalities together."""
        return sum(map(self.media.max_items, modalities))


class Checkpoint:
    """A checkpoint as this service uses it: family, tokenizers, chat template, fingerprint."""

    def __init__(self, model_dir: Path, plugins: Sequence[str] = (), limits: MediaLimits | None = None) -> None:
        self.family: ModelFamily = open_family(model_dir, limits, plugins)
        self.tokenizer = TextTokenizer(self.family.ctx.tokenizer)
        texts = self.family.placeholder_texts
        ids = {token_id: texts[modality] for token_id, modality in self.family.modality_of_placeholder.items()}
        self.chat = ChatRenderer(self.family.ctx, self.tokenizer, texts, ids)
        self.fingerprint: Fingerprint = fingerprint(self.family)


class Planner:
    """Plans requests against one checkpoint; safe to use from several threads."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        limits: Callable[[], RequestLimits],
        max_media_bytes: int = DEFAULT_MAX_MEDIA_BYTES,
        max_prompt_bytes: int = DEFAULT_MAX_PROMPT_BYTES,
    ) -> None:
        self.max_prompt_bytes = max_prompt_bytes
        self._family = checkpoint.family
        self._checkpoint = checkpoint
        self._limits = limits
        self._max_media_bytes = max_media_bytes
        self._prober = Prober(checkpoint.family.ctx)

    def plan(self, prompt: Prompt | Chat) -> Plan:
        """Token ids, placeholder ranges and tensor shapes of a request; nothing is decoded.

        UNIMPLEMENTED for items whose family has no layout: they show their tensors once they are mapped.
        """
        for index, media in enumerate(prompt.media):
            self._check_modality(media, index)
            if not self._family.has_layout(media.modality):
                raise UnimplementedError(
                    f"item {index}: {self._family.name} has no layout for {media.modality}, so these items cannot be "
                    "planned from their headers",
                    stage="plan",
                    item=index,
                    modality=media.modality,
                )
        return self.prepare(prompt)

    def prepare(self, prompt: Prompt | Chat) -> Plan:
        """The plan of a request that will be decoded: the tensors of items without a layout are still unknown."""
        start = time.perf_counter()
        limits = self._limits()
        self._check_input(prompt, limits)
        sources = [fetch(media, index, self._max_media_bytes) for index, media in enumerate(prompt.media)]
        probed = [
            self._prober.probe(media.modality, source, index)
            for index, (media, source) in enumerate(zip(prompt.media, sources, strict=True))
        ]
        for index, item in enumerate(probed):
            _check_size(item.info, index, limits)
        expanded = self._expand(self._tokenize(prompt, limits), [item.info for item in probed])
        _check_length(len(expanded.prompt_token_ids), limits)
        items = [
            self._planned_item(item, source, placeholder, expanded.prompt_token_ids)
            for item, source, placeholder in zip(probed, sources, expanded.placeholders, strict=True)
        ]
        return Plan(expanded.prompt_token_ids, tuple(items), time.perf_counter() - start)

    # --- stages -----------------------------------------------------------------------------------

    def _check_input(self, prompt: Prompt | Chat, limits: RequestLimits) -> None:
        is_empty = not prompt.messages if isinstance(prompt, Chat) else not prompt.text
        if is_empty:
            what = "conversation has no messages" if isinstance(prompt, Chat) else "prompt is empty"
            raise InvalidInputError(f"the {what}", stage="admit")
        texts = prompt.texts if isinstance(prompt, Chat) else (prompt.text,)
        check_text_size("the prompt", sum(map(num_text_bytes, texts)), self.max_prompt_bytes)
        for index, media in enumerate(prompt.media):
            self._check_modality(media, index)
        try:
            limits.media.check_counts(Counter(media.modality for media in prompt.media))
        except MediaError as error:
            raise from_media_error(error, "admit") from error

    def _check_modality(self, media: Media, index: int) -> None:
        try:
            self._family.check_modality(media.modality)
        except UnknownModalityError as error:
            raise InvalidInputError(
                f"item {index}: {error}", stage="admit", item=index, modality=media.modality
            ) from error

    def _tokenize(self, prompt: Prompt | Chat, limits: RequestLimits) -> list[int]:
        if isinstance(prompt, Chat):
            return self._checkpoint.chat.encode(prompt, lambda rendered: self._check_text(rendered, limits))
        self._check_text(prompt.text, limits)
        return self._checkpoint.tokenizer.encode(prompt.text)

    def _check_text(self, text: str, limits: RequestLimits) -> None:
        """Refuse, before the work of tokenizing it, a text that is too large or certain to be too many tokens."""
        num_bytes, longest = num_text_bytes(text), self._checkpoint.tokenizer.max_bytes_per_token
        # A template may have made more of the messages than they were.
        check_text_size("the prompt", num_bytes, self.max_prompt_bytes)
        if longest is not None:
            _check_length(-(-num_bytes // longest), limits, f"{num_bytes} bytes of text, at least ")

    def _expand(self, token_ids: list[int], infos: list[MediaInfo]) -> ProcessorInputs:
        if not token_ids:
            raise InvalidInputError("the prompt has no tokens", stage="tokenize")
        try:
            return self._family.process(ProcessorInputs(token_ids, infos))
        except MediaError as error:
            raise from_media_error(error, "plan") from error

    def _planned_item(
        self, item: Probed, source: bytes | MediaHeader, placeholder: PlaceholderRange, token_ids: list[int]
    ) -> PlannedItem:
        data = None if isinstance(source, MediaHeader) else source
        digest = None if data is None else self._digest(data)
        modality = item.info.modality
        layout = shown = self._family.layout(item.info) if self._family.has_layout(modality) else None
        if shown is None:
            shown = self._family.observed_layout(modality, token_ids[placeholder.offset : placeholder.end], {})
        return PlannedItem(
            item.info, layout, placeholder, item.file_format, digest, data, item.frames, shown.num_tokens
        )

    def _digest(self, data: bytes) -> bytes:
        hasher = hashlib.sha256(self._checkpoint.fingerprint.digest)
        hasher.update(data)
        return hasher.digest()


def _check_size(info: MediaInfo, index: int, limits: RequestLimits) -> None:
    try:
        limits.media.check_size(info, index)
    except MediaError as error:
        raise from_media_error(error, "probe") from error


def _check_length(num_tokens: int, limits: RequestLimits, so_many: str = "") -> None:
    """At least one output token must fit behind the prompt; `so_many` stands before the number in the error."""
    if limits.max_model_len is not None and num_tokens > limits.max_model_len - 1:
        raise LimitExceededError(
            f"the prompt has {so_many}{num_tokens} tokens; at most {limits.max_model_len - 1} fit "
            f"(max_model_len {limits.max_model_len} leaves room for one output token)",
            stage="plan",
            limit=limits.max_model_len - 1,
            actual=num_tokens,
        )
