"""What is under check: a checkpoint, the family that serves it, and the items it is tried with."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from registry.checks.probes import probe_infos
from registry.context import InputContext, read_architecture
from registry.errors import RegistryError
from registry.families import open_family
from registry.family import ModelFamily
from registry.fingerprint import Fingerprint
from registry.media import MediaInfo


class Subject:
    """Read on first use, so that each stage raises what is its own to say."""

    def __init__(self, model_dir: Path, plugins: Sequence[str] = ()) -> None:
        self.model_dir = model_dir
        self.plugins = tuple(plugins)
        self.fingerprint: Fingerprint | None = None
        self.warnings: list[str] = []
        self._probes: dict[str, list[MediaInfo]] = {}

    @cached_property
    def family(self) -> ModelFamily:
        """The family, bound to the checkpoint."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                return open_family(self.model_dir, plugins=self.plugins)
            finally:
                self.warnings += [str(one.message) for one in caught if issubclass(one.category, UserWarning)]

    @property
    def ctx(self) -> InputContext:
        """The checkpoint."""
        return self.family.ctx

    @property
    def architecture(self) -> str | None:
        """The checkpoint's architecture, None where it names none."""
        with contextlib.suppress(RegistryError):
            return read_architecture(self.model_dir)
        return None

    @property
    def family_name(self) -> str | None:
        """The family's class, None where there is none that works."""
        return self.family.name if "family" in self.__dict__ else None

    @cached_property
    def layouts(self) -> tuple[str, ...]:
        """Modalities that have a layout."""
        return tuple(modality for modality in self.family.modalities if self.family.has_layout(modality))

    def probes(self, modality: str) -> list[MediaInfo]:
        """Every item the layout is asked for, the smallest first."""
        if modality not in self._probes:
            self._probes[modality] = probe_infos(self.ctx, modality)
        return self._probes[modality]
