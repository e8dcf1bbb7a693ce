"""The `diptych` op library: one place where schemas are defined and implementations are attached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

NAMESPACE: Final = "diptych"
_LIBRARY: Final = torch.library.Library(NAMESPACE, "DEF")


def define_op(schema: str, *, cpu: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define `diptych::name` from a schema such as `"scale(Tensor x, float by) -> Tensor"`; returns the op.

    `cpu` is the reference implementation, `fake` computes shapes and dtypes alone.
    """
    name = schema.partition("(")[0].strip()
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, cpu, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
