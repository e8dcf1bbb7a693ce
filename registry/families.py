"""Which family serves a checkpoint: plugins over entry points over the families in this package."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final

from registry.context import InputContext, read_architecture
from registry.errors import RegistryError, UnknownArchitectureError
from registry.family import ModelFamily
from registry.hooks import SupportsMultiModal
from registry.limits import MediaLimits
from registry.models import BUILT_IN_FAMILIES

ENTRY_POINT_GROUP: Final = "diptych.models"


def bind_family(ctx: InputContext, plugins: Sequence[str] = ()) -> ModelFamily:
    """The family of the checkpoint's architecture, bound to it.

    `plugins` are module names; UnknownArchitectureError lists what is registered.
    """
    return ModelFamily(_find_class(ctx.architecture, ctx.model_dir, plugins), ctx)


def open_family(model_dir: str | Path, limits: MediaLimits | None = None, plugins: Sequence[str] = ()) -> ModelFamily:
    """The family of a checkpoint directory, which is read the way the family says."""
    path = Path(model_dir)
    cls = _find_class(read_architecture(path), path, plugins)
    return ModelFamily(cls, InputContext.from_checkpoint(path, limits, cls.config_class))


def _find_class(architecture: str, model_dir: Path, plugins: Sequence[str]) -> type[SupportsMultiModal]:
    known = known_families(plugins)
    if architecture not in known:
        raise UnknownArchitectureError(
            f"no family is registered for architecture {architecture!r} of {model_dir}; "
            f"registered: {', '.join(sorted(known))}; --plugin MODULE brings others"
        )
    return _resolve(known[architecture])


def known_families(plugins: Sequence[str] = ()) -> Mapping[str, str | type[SupportsMultiModal]]:
    """Architecture name -> class, or `"module:Class"` where it has not been imported yet."""
    known: dict[str, str | type[SupportsMultiModal]] = dict(BUILT_IN_FAMILIES)
    _add(known, {entry.name: entry.value for entry in entry_points(group=ENTRY_POINT_GROUP)}, "the entry point")
    for module in plugins:
        _add(known, _families_of(module), f"the plugin {module}")
    return known


def _add(
    known: dict[str, str | type[SupportsMultiModal]],
    more: Mapping[str, str | type[SupportsMultiModal]],
    source: str,
) -> None:
    for architecture, family in more.items():
        if architecture in known:
            warnings.warn(f"{architecture} is registered more than once; {source} counts", stacklevel=3)
        known[architecture] = family


def _families_of(module_name: str) -> dict[str, str | type[SupportsMultiModal]]:
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # it is somebody's program: anything may come out
        raise RegistryError(f"cannot import the plugin {module_name!r}: {_reason(error)}") from error
    classes = {
        value: None  # once, however many names it has
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, SupportsMultiModal) and value.__module__ == module.__name__
    }
    if not classes:
        raise RegistryError(f"the plugin {module_name!r} defines no class that implements SupportsMultiModal")
    families: dict[str, str | type[SupportsMultiModal]] = {}
    for cls in classes:
        _add(families, dict.fromkeys(cls.architecture_names(), cls), f"{cls.__name__} of the plugin {module_name}")
    return families


def _resolve(family: str | type[SupportsMultiModal]) -> type[SupportsMultiModal]:
    if not isinstance(family, str):
        return family
    module_name, _, class_name = family.partition(":")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (Exception, SystemExit) as error:
        raise RegistryError(f"cannot load the family {family!r}: {_reason(error)}") from error
    if not (isinstance(cls, type) and issubclass(cls, SupportsMultiModal)):
        raise RegistryError(f"{family!r} does not implement SupportsMultiModal")
    return cls


def _reason(error: BaseException) -> str:
    """The error and its own words; where torch is what is missing, what to do about it."""
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] == "torch":
        return (
            "it needs torch, which is not installed here. A family in one file with its model works only where torch "
            "is; for a preprocess service without it use two files: registration in a module that imports no torch, "
            'the model in another, named by executor_model = "package.module:Class"'
        )
    return str(error) if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
