"""What every hook is given: the checkpoint's configuration, processor, tokenizer and the service's limits."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

# By its module: without torch, transformers 5.17 puts a placeholder that always raises at the top level.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from registry.errors import CheckpointError, MediaSizeError, TooManyItemsError
from registry.media import MediaInfo

ConfigT = TypeVar("ConfigT", bound=PreTrainedConfig)
ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class MediaLimits:
    """Limits on one request's media.

    `max_items_per_prompt` by modality, 1 where none is given; `max_image_side` in pixels;
    `max_image_pixels` bounds height times width.
    """

    max_items_per_prompt: Mapping[str, int] = field(default_factory=dict)
    max_image_side: int = 8192
    max_image_pixels: int = 64 * 1024 * 1024

    def max_items(self, modality: str) -> int:
        """Items of `modality` that one prompt may have."""
        return self.max_items_per_prompt.get(modality, 1)

    def check_counts(self, counts: Mapping[str, int]) -> None:
        """TooManyItemsError naming both numbers for the first modality above its limit."""
        for modality, count in counts.items():
            if count > (limit := self.max_items(modality)):
                raise TooManyItemsError(
                    f"the prompt has {count} {modality} items; at most {limit} are allowed "
                    f"(--limit-mm-per-prompt {modality}={limit})",
                    limit=limit,
                    actual=count,
                )

    def check_size(self, info: MediaInfo, item_index: int | None = None) -> None:
        """MediaSizeError if an image or a frame is larger than a side or the pixel limit allows."""
        if info.height is None or info.width is None:
            return
        if max(info.size) > self.max_image_side:
            raise MediaSizeError(
                f"the image is {info.height}x{info.width} pixels; its longer side may have at most "
                f"{self.max_image_side}",
                item_index=item_index,
                limit=self.max_image_side,
                actual=max(info.size),
            )
        if (pixels := info.height * info.width) > self.max_image_pixels:
            raise MediaSizeError(
                f"the image has {pixels} pixels ({info.height}x{info.width}); at most {self.max_image_pixels} "
                "are allowed",
                item_index=item_index,
                limit=self.max_image_pixels,
                actual=pixels,
            )


@dataclass(frozen=True)
class InputContext:
    """A checkpoint as the hooks see it.

    `model_config` is transformers' typed configuration; `processor_config` is the merged content of
    `preprocessor_config.json` and `processor_config.json`; `tokenizer` is transformers' fast tokenizer.
    """

    model_dir: Path
    model_config: Any
    processor_config: Mapping[str, Any]
    tokenizer: Any
    limits: MediaLimits = field(default_factory=MediaLimits)
    _remembered: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def from_checkpoint(
        cls, model_dir: str | Path, limits: MediaLimits | None = None, config_class: Any = AutoConfig
    ) -> InputContext:
        """Read a checkpoint directory; CheckpointError says which file is missing or wrong.

        Nothing is ever fetched: the directory must hold every file.
        """
        path = Path(model_dir)
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path} is not a checkpoint directory: it has no config.json")
        try:
            config = config_class.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
            raise CheckpointError(f"cannot read {path / 'config.json'}: {error}") from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            hint = "" if (path / "tokenizer.json").is_file() else ", which has no tokenizer.json"
            raise CheckpointError(f"cannot read the tokenizer of {path}{hint}: {error}") from error
        if not getattr(tokenizer, "is_fast", False):
            raise CheckpointError(f"the tokenizer of {path} has no fast form (tokenizer.json); convert it first")
        return cls(path, config, _read_processor_config(path), tokenizer, limits or MediaLimits())

    @property
    def architecture(self) -> str:
        """The checkpoint's first architecture name."""
        architectures = getattr(self.model_config, "architectures", None) or []
        if not architectures:
            raise CheckpointError(f"{self.model_dir / 'config.json'} names no architecture")
        return str(architectures[0])

    @property
    def text_config(self) -> Any:
        """Configuration of the language model."""
        return self.model_config.get_text_config()

    @property
    def vocab_size(self) -> int:
        """Rows of the token embedding; token ids are below it."""
        return int(self.text_config.vocab_size)

    def get_config(self, config_class: type[ConfigT]) -> ConfigT:
        """`model_config` as `config_class`; TypeError naming both classes if it is another."""
        if not isinstance(self.model_config, config_class):
            raise TypeError(
                f"{self.architecture} needs a {config_class.__name__}, the checkpoint has a "
                f"{type(self.model_config).__name__}"
            )
        return self.model_config

    def remember(self, make: Callable[[InputContext], ValueT]) -> ValueT:
        """`make(self)`, computed once per context: for what a hook derives from the checkpoint alone."""
        if make not in self._remembered:
            self._remembered[make] = make(self)
        value: ValueT = self._remembered[make]
        return value

    @cached_property
    def image_processor(self) -> Any:
        """The checkpoint's transformers image processor, PIL backend."""
        try:
            return AutoImageProcessor.from_pretrained(self.model_dir, backend="pil", local_files_only=True)
        except (OSError, ValueError, ImportError) as error:
            raise CheckpointError(f"cannot make the image processor of {self.model_dir}: {error}") from error


def _read_processor_config(path: Path) -> dict[str, Any]:
    """Both processor files, the newer one winning; an empty dictionary where there are none."""
    merged: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (path / name).is_file():
            try:
                merged.update(json.loads((path / name).read_text("utf-8")))
            except ValueError as error:
                raise CheckpointError(f"{path / name} is not valid JSON: {error}") from error
    return merged
