"""The `diptych` op library: one place where schemas are defined and implementations are attached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

NAMESPACE: Final = "diptych"
_LIBRARY: Final = torch.library.Library(NAMESPACE, "DEF")


class Op:
    """One op: called, it goes through torch's dispatcher, as a model written against it does."""

    def __init__(self, name: str, cpu: Callable[..., Any], cuda: Callable[..., Any] | None) -> None:
        self._overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        self._implementations = {"cpu": cpu} if cuda is None else {"cpu": cpu, "cuda": cuda}

    def __call__(self, *arguments: Any) -> Any:
        """What the schema says."""
        return self._overload(*arguments)

    def direct(self, device_type: str) -> Callable[..., Any]:
        """The implementation itself: a loop that calls it thousands of times a second saves the dispatcher's share."""
        return self._implementations[device_type]


def define_op(
    schema: str, *, cpu: Callable[..., Any], fake: Callable[..., Any], cuda: Callable[..., Any] | None = None
) -> Op:
    """Define `diptych::name` from a schema such as `"scale(Tensor x, float by) -> Tensor"`; returns the op.

    `cpu` is the reference implementation, `fake` computes shapes and dtypes alone, `cuda` launches our kernel.
    """
    name = schema.partition("(")[0].strip()
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, cpu, "CPU")
    if cuda is not None:
        _LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return Op(name, cpu, cuda)
