"""The layout holds for every size, and the input mapper makes exactly the tensors it promises."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import numpy as np

from registry.checks.probes import describe, large_pictures, noise_item, representatives
from registry.checks.report import Findings
from registry.checks.subject import Subject
from registry.errors import InvalidHookError, MediaError
from registry.family import ModelFamily
from registry.layout import ItemLayout, TensorSpec
from registry.media import MediaInfo

MAX_ITEMS: Final = 96
AT_LEAST: Final = 24
SECONDS: Final = 5.0
"""Mapping ends after so many items, or after so many seconds and at least so many items."""


def check_mapper(subject: Subject, findings: Findings) -> str:
    """Every layout of the search; of those the telling ones against the mapper."""
    details = []
    for modality in subject.layouts:
        probes = lay_out(subject, modality, findings)
        num_mapped = 0
        for info in findings.each(_mapped(probes), AT_LEAST, SECONDS):
            check_item(subject.family, info, findings)
            num_mapped += 1
        details.append(f"{modality}: {len(probes)} layouts, {num_mapped} items mapped")
    for modality in set(subject.family.modalities) - set(subject.layouts):
        details.append(f"{modality}: no layout to compare with")
    return "; ".join(details)


def _mapped(probes: Sequence[tuple[MediaInfo, ItemLayout]]) -> list[MediaInfo]:
    """The telling ones, the large ones among those that there is always time for."""
    telling, large = representatives(probes), large_pictures(probes)
    first = AT_LEAST - len(large)
    return list(dict.fromkeys([*telling[:first], *large, *telling[first:]]))[:MAX_ITEMS]


def lay_out(subject: Subject, modality: str, findings: Findings) -> list[tuple[MediaInfo, ItemLayout]]:
    """Every probe that the family takes, with its layout."""
    found = []
    for info in subject.probes(modality):
        with findings.calling(f"{modality} layout", describe(info)):
            try:
                found.append((info, subject.family.layout(info)))
            except MediaError:
                continue  # the layout says that it cannot take such an item: that is its right
    return found


def check_item(family: ModelFamily, info: MediaInfo, findings: Findings) -> None:
    """The mapper's tensors of one item; what does not fit is described by name."""
    hook, item = f"{info.modality} input mapper", noise_item(info)
    with findings.calling(hook, describe(info)):
        try:
            mapped = family.map_item(item)
        except InvalidHookError as error:
            emitted = family.emit(item)
            differences = list(_differences(family.layout(info), emitted)) if isinstance(emitted, Mapping) else []
            for expected, actual in differences or [("the layout's tensors", str(error))]:
                findings.fail(hook, describe(info), expected, actual)
        else:
            _check_finite(hook, info, mapped, findings)


def _check_finite(hook: str, info: MediaInfo, mapped: Mapping[str, np.ndarray], findings: Findings) -> None:
    """A NaN would spread to every logit, where nothing tells who made it."""
    for name, array in mapped.items():
        if array.dtype.kind == "f" and not (finite := np.isfinite(array)).all():
            actual = f"{array.size - int(finite.sum())} of {array.size} values are NaN or infinite"
            findings.fail(hook, describe(info), f"finite {name}", actual)


def _differences(layout: ItemLayout, arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[str, str]]:
    """(the layout's, the mapper's) of every tensor and constant that differs."""
    for name, spec in layout.tensors.items():
        expected, actual = _spec(name, spec), _array(name, arrays, spec.shape)
        if expected != actual:
            yield expected, actual
    for name in layout.constants.keys() & arrays.keys():
        expected, actual = f"{name} {layout.constants[name].tolist()}", f"{name} {np.asarray(arrays[name]).tolist()}"
        if expected != actual:
            yield expected, actual
    for name in arrays.keys() - layout.tensors.keys() - layout.constants.keys():
        yield f"only {', '.join(layout.tensors)}", f"{name} too"


def _spec(name: str, spec: TensorSpec) -> str:
    return f"{name} {spec.dtype} {list(spec.shape)}"


def _array(name: str, arrays: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> str:
    if name not in arrays:
        return f"no {name}"
    array = np.asarray(arrays[name])
    dropped = array.ndim == len(shape) + 1 and array.shape[0] == 1
    return f"{name} {array.dtype.name} {list(array.shape[1:] if dropped else array.shape)}"
