"""Claims about items whose size decides what their tiles mean: LLaVA-NeXT on the wire."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diptych.v1 import executor_pb2
from executor_service.engine.messages import SamplingParams
from executor_service.engine.request import EngineItem, Request
from registry import MediaInfo, PlaceholderRange
from registry.family import ModelFamily
from registry.models.llava_next import AnyRes
from tests.checkpoints import make_llava_checkpoint
from tests.executor_service.conftest import GREEDY, Bench, boot_engine, load_reference
from tests.executor_service.peer import Peer, Planner

PINPOINTS = [[56, 168], [168, 56], [112, 112]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava_checkpoint(tmp_path_factory.mktemp("anyres") / "model", pinpoints=PINPOINTS)


def test_another_number_of_tiles_is_refused(channel, planner: Planner) -> None:
    """Four tiles where the size asks for five, with as many bytes as it says."""
    few, many = planner.plan(sizes=((56, 168),)), planner.plan(sizes=((112, 112),))
    assert (len(few.tensors[0]), len(many.tensors[0])) == (4, 5)
    many.start.items[0].tensors[0].CopyFrom(few.start.items[0].tensors[0])
    with Peer(channel) as peer:
        peer.start(1, many)
        answer = peer.finish(1)
    assert answer.code.name == "INVALID_ARGUMENT"
    assert (answer.facts["stage"], answer.facts["item"]) == ("attest", "0")
    assert "must be [5, 3, 56, 56]" in answer.status.message


def alike_but_for_their_grid(family: ModelFamily) -> tuple[tuple[int, int], tuple[int, int]]:
    """Two sizes with as many tiles and tokens, of which the features' rows and columns differ."""
    anyres = family.ctx.remember(AnyRes.read)
    seen: dict[tuple[int, int], tuple[int, int]] = {}
    for height in range(20, 169, 4):
        for width in range(20, 169, 4):
            layout = family.layout(MediaInfo.image(height, width))
            kind = (layout.num_tokens, layout.tensors["pixel_values"].shape[0])
            other = seen.setdefault(kind, (height, width))
            if anyres.unpadded(other) != anyres.unpadded((height, width)):
                return other, (height, width)
    raise AssertionError("there are none")


def test_a_false_size_with_the_same_layout_gets_the_declared_sizes_answer(
    channel, planner: Planner, checkpoint: Path
) -> None:
    family = planner.family
    true, declared = alike_but_for_their_grid(family)
    honest, false = (planner.plan(sizes=(true,), max_tokens=12) for _ in range(2))
    false.start.items[0].info.CopyFrom(planner.plan(sizes=(declared,)).start.items[0].info)
    with Peer(channel) as peer:
        answers = [peer.run(handle, planned).tokens for handle, planned in enumerate((honest, false), 1)]
    expected = [expected_tokens(checkpoint, family, honest.tensors[0], size, honest.start) for size in (true, declared)]
    assert answers == expected
    assert expected[0] != expected[1], "the size decides what the tiles mean"


def expected_tokens(
    checkpoint: Path, family: ModelFamily, tiles: np.ndarray, size: tuple[int, int], start: executor_pb2.Start
) -> list[int]:
    """transformers' answer about these tiles for a picture of that size."""
    bench = Bench(checkpoint, boot_engine(checkpoint), load_reference(checkpoint))
    place = PlaceholderRange(start.items[0].placeholder.offset, start.items[0].placeholder.length)
    tensors = {"pixel_values": torch.from_numpy(tiles)}
    item = EngineItem(place, "image", family.layout(MediaInfo.image(*size)), tensors)
    params = SamplingParams(max_tokens=start.sampling.max_tokens, **GREEDY)
    return bench.expected(Request(0, list(start.prompt_token_ids), [item], params, bench.booted.report.max_model_len))
