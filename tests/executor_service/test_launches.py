"""What compute-sanitizer watches: every op there is, with arguments that the ops' references take."""

from __future__ import annotations

import pytest
import torch

from executor_service.kernels.library import NAMESPACE
from tests.executor_service.gpu import launches


def test_every_op_is_launched() -> None:
    defined = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{NAMESPACE}::")}
    assert defined == {f"{NAMESPACE}::{name}" for names in launches.LAUNCHES for name in names}


@pytest.mark.parametrize("names", list(launches.LAUNCHES), ids=lambda names: names[0])
def test_launches_run(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """On the CPU."""
    monkeypatch.setattr(launches, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert launches.main(names[:1]) == 0
    assert capsys.readouterr().out.splitlines() == [f"op {', '.join(names)}", "op -"]
