"""What every hook is given: the checkpoint's configuration, processor, tokenizer and the service's limits."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from registry.errors import CheckpointError
from registry.limits import MediaLimits

if TYPE_CHECKING:  # takes seconds, and who only reads or passes on what a context has made need not wait
    from transformers import PreTrainedConfig

__all__ = ["InputContext", "MediaLimits"]

DEFAULT_SAMPLING_RATE: Final = 16000
"""Hz, where a checkpoint's processor names no rate."""
ConfigT = TypeVar("ConfigT", bound="PreTrainedConfig")
ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class InputContext:
    """A checkpoint as the hooks see it.

    `model_config` is transformers' typed configuration; `processor_config` is the merged content of
    `preprocessor_config.json` and `processor_config.json`, with that of `video_preprocessor_config.json` as
    its `video_processor`; `tokenizer` is transformers' fast tokenizer.
    """

    model_dir: Path
    model_config: Any
    processor_config: Mapping[str, Any]
    tokenizer: Any
    limits: MediaLimits = field(default_factory=MediaLimits)
    _remembered: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def from_checkpoint(
        cls, model_dir: str | Path, limits: MediaLimits | None = None, config_class: Any = None
    ) -> InputContext:
        """Read a checkpoint directory; CheckpointError says which file is missing or wrong.

        Nothing is ever fetched: the directory must hold every file. `config_class` None: transformers' AutoConfig.
        """
        path = Path(model_dir)
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path} is not a checkpoint directory: it has no config.json")
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig, AutoTokenizer

        try:
            config = (config_class or AutoConfig).from_pretrained(path, local_files_only=True)
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

    @cached_property
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
    def sampling_rate(self) -> int:
        """Samples per second of the audio the checkpoint takes, in Hz."""
        nested = self.processor_config.get("feature_extractor")
        sources = (self.processor_config, nested if isinstance(nested, Mapping) else {})
        found = next((rate for source in sources if (rate := source.get("sampling_rate"))), DEFAULT_SAMPLING_RATE)
        if not isinstance(found, int) or found < 1:
            raise CheckpointError(f"the sampling_rate of {self.model_dir} is {found!r}; it must be a number of Hz")
        return found

    @cached_property
    def feature_extractor(self) -> Any:
        """The checkpoint's transformers feature extractor, for audio."""
        # By its module: without torch, transformers 5.17 puts a placeholder that always raises at the top level.
        from transformers.models.auto.feature_extraction_auto import AutoFeatureExtractor

        try:
            return AutoFeatureExtractor.from_pretrained(self.model_dir, local_files_only=True)
        except (OSError, ValueError, ImportError) as error:
            raise CheckpointError(f"cannot make the feature extractor of {self.model_dir}: {error}") from error

    @cached_property
    def image_processor(self) -> Any:
        """The checkpoint's transformers image processor, PIL backend."""
        from transformers.models.auto.image_processing_auto import AutoImageProcessor  # by its module, as above

        try:
            return AutoImageProcessor.from_pretrained(self.model_dir, backend="pil", local_files_only=True)
        except (OSError, ValueError, ImportError) as error:
            raise CheckpointError(f"cannot make the image processor of {self.model_dir}: {error}") from error


def read_architecture(model_dir: Path) -> str:
    """The first architecture name in `config.json`; CheckpointError if there is none."""
    path = model_dir / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{model_dir} is not a checkpoint directory: it has no config.json")
    try:
        architectures = json.loads(path.read_text("utf-8")).get("architectures") or [""]
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not architectures[0]:
        raise CheckpointError(f"{path} names no architecture")
    return str(architectures[0])


def _read_processor_config(path: Path) -> dict[str, Any]:
    """All processor files, the newer form winning; an empty dictionary where there are none."""
    merged = {**_read_json(path / "preprocessor_config.json"), **_read_json(path / "processor_config.json")}
    if video := _read_json(path / "video_preprocessor_config.json"):
        merged.setdefault("video_processor", video)
    return merged


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content
