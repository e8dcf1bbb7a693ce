"""The hooks of a model family, and the class they are stacked on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import numpy as np

from registry.context import InputContext
from registry.errors import CheckpointError
from registry.layout import ItemLayout
from registry.media import MediaInfo, MediaItem

if TYPE_CHECKING:
    from registry.inputs import DummyData, ProcessorInputs

LayoutHook = Callable[[InputContext, MediaInfo], ItemLayout]
InputMapperHook = Callable[[InputContext, MediaItem], Mapping[str, np.ndarray]]
MaxTokensHook = Callable[[InputContext], int]
DummyDataHook = Callable[[InputContext, int, Mapping[str, int]], "DummyData"]
FamilyT = TypeVar("FamilyT", bound="type[SupportsMultiModal]")
InputProcessorHook = Callable[[InputContext, "ProcessorInputs"], "ProcessorInputs"]


class SupportsMultiModal:
    """Base of every model family.

    `executor_model` names the class that runs the model, as `"package.module:Class"`; it is imported by
    the executor only. `architectures` are the checkpoint architecture names the family serves; by
    default the class's own name. `config_class` reads `config.json`, for models that transformers does not
    know; by default AutoConfig does.
    """

    executor_model: ClassVar[str | None] = None
    config_class: ClassVar[Any] = None
    architectures: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def architecture_names(cls) -> tuple[str, ...]:
        """Names under which the family is looked up."""
        return cls.architectures or (cls.__name__,)

    @classmethod
    def placeholder_token_id(cls, ctx: InputContext, modality: str) -> int:
        """The token that stands for one item of `modality` in a prompt before expansion."""
        for attribute in (f"{modality}_token_id", f"{modality}_token_index"):
            value = getattr(ctx.model_config, attribute, None)
            if isinstance(value, int):
                return value
        raise CheckpointError(
            f"{cls.__name__}: the configuration of {ctx.model_dir} has no {modality}_token_id; "
            "override placeholder_token_id in the family"
        )


class Decorator(Protocol):
    """What the registration functions return: it notes the hook and gives the class back."""

    def __call__(self, family: FamilyT, /) -> FamilyT:
        """Decorate one family."""


@dataclass
class Hooks:
    """What was registered for one class; an entry of None means "registered empty: the default"."""

    layouts: dict[str, LayoutHook] = field(default_factory=dict)
    input_mappers: dict[str, InputMapperHook | None] = field(default_factory=dict)
    max_tokens: dict[str, MaxTokensHook | int | None] = field(default_factory=dict)
    dummy_data: DummyDataHook | None = None
    input_processor: InputProcessorHook | None = None
    registered: set[str] = field(default_factory=set)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modalities any hook was registered for, in order of registration."""
        return tuple(dict.fromkeys((*self.layouts, *self.input_mappers, *self.max_tokens)))


_HOOKS: dict[type, Hooks] = {}


def hooks_of(family: type) -> Hooks:
    """The hooks registered for exactly this class, made empty on first use."""
    return _HOOKS.setdefault(family, Hooks())


def note_registration(family: type, what: str) -> Hooks:
    """The class's hooks, with a warning if `what` had been registered for it before."""
    if not (isinstance(family, type) and issubclass(family, SupportsMultiModal)):
        name: Any = getattr(family, "__name__", family)
        raise TypeError(f"{what} is registered for {name}, which does not implement SupportsMultiModal")
    hooks = hooks_of(family)
    if what in hooks.registered:
        warnings.warn(f"{family.__name__}: {what} is registered twice; the later one counts", stacklevel=3)
    hooks.registered.add(what)
    return hooks
