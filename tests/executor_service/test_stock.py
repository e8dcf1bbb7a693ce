"""What a model of transformers' may call its decoder."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.checkpoints import write_json
from tests.executor_service.conftest import Bench, boot_engine
from tests.executor_service.test_engine_tokens import mixed_requests


@pytest.mark.parametrize("decoder", ["stock", "fused"])
def test_a_decoder_of_another_name_is_the_one_that_runs(checkpoint, reference, tmp_path, decoder: str) -> None:
    """`language_model` says which it is, to either path; the class has none where others have it."""
    path = shutil.copytree(checkpoint, tmp_path / "renamed")
    config = json.loads((path / "config.json").read_text())
    write_json(path / "config.json", {**config, "architectures": ["RenamedForConditionalGeneration"]})
    booted = boot_engine(path, plugins=("tests.plugins.renamed",), decoder=decoder)
    model = booted.engine.runner.model
    assert type(model).__name__ == "RenamedModel"
    assert not hasattr(model.hf.model, "language_model")
    assert (model.fused_decoder is not None) == (decoder == "fused")
    bench = Bench(checkpoint, booted, reference)
    requests = mixed_requests(bench, 6)
    outputs = bench.run(requests)
    for request in requests:
        assert outputs[request.request_id] == bench.expected(request)
