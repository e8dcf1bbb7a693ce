"""The boot's profile run is the largest step of the largest pictures that its limits admit, counted where it runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
from torch import Tensor

from executor_service.engine.logprobs import PendingLogprobs
from executor_service.engine.sampler import Sampler
from executor_service.layers.context import current_context
from executor_service.models.llava import LlavaModel
from executor_service.models.llava_next import LlavaNextModel
from executor_service.models.stock import StockModel
from tests.checkpoints import Checkpoints
from tests.executor_service.conftest import Bench, boot_engine, picture

PINPOINTS = [[56, 112], [112, 56], [112, 112]]
FAMILIES: dict[str, dict[str, Any]] = {"llava": {}, "llava-next": {"pinpoints": PINPOINTS}}
LARGEST = {"llava": (16, 56, 56), "llava-next": (88, 112, 112)}
"""Features of the largest picture, and a size that has them. In tiles of 4 x 4: one; or an overview, and four with
a newline behind each of their eight lines."""
NUM_TILES = {"llava": 1, "llava-next": 5}
PROMPT_ROWS = 64
"""Logits of a prompt that exist at the same time."""


class Most(NamedTuple):
    """Items and tiles encoded at once, tokens of a step, rows sampled at once."""

    items: int
    tiles: int
    tokens: int
    rows: int


@dataclass
class Seen:
    """What the model, the sampler and the scores of prompts were given, call by call."""

    items: list[int] = field(default_factory=list)
    tiles: list[int] = field(default_factory=list)
    chunks: list[list[int]] = field(default_factory=list)
    logits: list[int] = field(default_factory=list)
    scores: list[int] = field(default_factory=list)
    sampled: list[list[Any]] = field(default_factory=list)

    @property
    def most(self) -> Most:
        return Most(max(self.items), max(self.tiles), max(map(sum, self.chunks)), max(map(len, self.sampled)))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Filled by every engine of the test, from its boot on."""
    seen = Seen()

    def spy(cls: type, name: str, note: Callable[..., None]) -> None:
        original = cls.__dict__[name]

        @functools.wraps(original)
        def noting(self: Any, *arguments: Any, **keywords: Any) -> Any:
            note(*arguments, **keywords)
            return original(self, *arguments, **keywords)

        monkeypatch.setattr(cls, name, noting)

    def encode(pixel_values: list[Any], **_: Any) -> None:
        tensors = [getattr(tile, "tensor", tile) for tile in pixel_values]
        seen.items.append(len(tensors))
        seen.tiles.append(sum(len(tensor) if tensor.ndim == 4 else 1 for tensor in tensors))

    def forward(input_ids: Tensor, positions: Tensor, inputs_embeds: Tensor, *_: Any, **__: Any) -> None:
        chunks = current_context().metadata.cu_seqlens.diff().tolist()
        assert len(inputs_embeds) == sum(chunks)
        seen.chunks.append(chunks)

    def sample(logits: Tensor, requests: Any) -> None:
        assert len(logits) == len(requests)
        seen.sampled.append([request.sampling for request in requests])

    for model in (LlavaModel, LlavaNextModel):
        spy(model, "embed_multimodal", encode)
    spy(StockModel, "forward", forward)
    spy(StockModel, "compute_logits", lambda rows: seen.logits.append(len(rows)))
    spy(PendingLogprobs, "__init__", lambda logits, *_: seen.scores.append(len(logits)))
    spy(Sampler, "sample", sample)
    return seen


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("profiled"))


@pytest.mark.parametrize(
    ("family", "limits", "items", "chunks"),
    [
        # 12 pictures of 16 features: one more would be 208. All tokens may be one request's, with four pictures.
        ("llava", {"max_num_batched_tokens": 200, "max_num_seqs": 5}, [12, 4], [200]),
        # Whole numbers of pictures and requests.
        ("llava", {"max_num_batched_tokens": 192, "max_num_seqs": 3, "max_model_len": 64}, [12, 4], [64, 64, 64]),
        # Requests are shorter than a step, which ends with a piece of one.
        ("llava", {"max_num_batched_tokens": 200, "max_num_seqs": 5, "max_model_len": 64}, [12, 4], [64, 64, 64, 8]),
        # So many requests as may run do not fill a step.
        ("llava", {"max_num_batched_tokens": 200, "max_num_seqs": 3, "max_model_len": 50}, [12, 4], [50, 50, 50]),
        # A picture is encoded at once, though it has more features than a step has tokens.
        ("llava", {"max_num_batched_tokens": 10, "max_num_seqs": 7}, [1, 1], [10]),
        # More rows than prompts that are scored have at once.
        ("llava", {"max_num_batched_tokens": 100, "max_num_seqs": 70}, [6, 4], [100]),
        # Five pictures of 88 features; then one token less than six have, and just as many.
        ("llava-next", {"max_num_batched_tokens": 512, "max_num_seqs": 5}, [5, 4], [512]),
        ("llava-next", {"max_num_batched_tokens": 527, "max_num_seqs": 9, "max_model_len": 400}, [5, 4], [400, 127]),
        ("llava-next", {"max_num_batched_tokens": 528, "max_num_seqs": 9, "max_model_len": 400}, [6, 4], [400, 128]),
        ("llava-next", {"max_num_batched_tokens": 60, "max_num_seqs": 5}, [1, 1], [60]),
    ],
)
@pytest.mark.parametrize("decoder", ["fused", "stock"])
def test_the_profile_runs_what_the_limits_admit(
    checkpoints: Checkpoints, seen: Seen, family: str, limits: dict[str, int], items: list[int], chunks: list[int],
    decoder: str,
) -> None:  # fmt: skip
    """The encoder by itself, then a step of the longest chunks that there are, then the sampler."""
    boot_engine(checkpoints(**FAMILIES[family]), decoder=decoder, **limits)
    num_rows = limits["max_num_seqs"]
    assert seen.items == items
    assert seen.tiles == [count * NUM_TILES[family] for count in items]
    assert seen.chunks == [chunks]
    assert max(seen.logits) == max(num_rows, PROMPT_ROWS)
    assert seen.scores == [PROMPT_ROWS]
    step, alone = seen.sampled
    assert len(step) <= len(alone) == num_rows
    assert all(map(asks_for_everything, alone))


def asks_for_everything(sampling: Any) -> bool:
    """Whether a row goes through every part of the sampler."""
    return (
        sampling.temperature > 0
        and sampling.top_p < 1
        and sampling.min_p > 0
        and sampling.logprobs == 20
        and sampling.has_penalties
        and sampling.logit_bias
        and sampling.bad_words
    )


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_full_load_is_what_the_profile_ran(checkpoints: Checkpoints, seen: Seen, family: str) -> None:
    """Requests that fill every budget reach it, and no step does more."""
    features, height, width = LARGEST[family]
    limits = {"max_num_batched_tokens": 4 * features - 1, "max_num_seqs": 7}
    checkpoint = checkpoints(**FAMILIES[family])
    bench = Bench(checkpoint, boot_engine(checkpoint, **limits), None)
    profiled = Most(seen.items[0], seen.tiles[0], sum(seen.chunks[0]), len(seen.sampled[-1]))
    assert profiled == Most(3, 3 * NUM_TILES[family], 4 * features - 1, 7)
    for calls in (seen.items, seen.tiles, seen.chunks, seen.sampled):
        calls.clear()
    requests = [
        bench.request(number, "<image>" + " tail" * 20 * (number // 6), [picture(number, height, width)], max_tokens=30)
        for number in range(20)
    ]
    bench.run(requests)
    assert seen.most == profiled


def test_narrow_pictures_do_not_make_the_tower_larger(checkpoints: Checkpoints, seen: Seen) -> None:
    """They have as many tiles as square ones and fewer features, so a step encodes more of them: in several runs."""
    checkpoint = checkpoints(**FAMILIES["llava-next"])
    bench = Bench(checkpoint, boot_engine(checkpoint, max_num_batched_tokens=527, max_num_seqs=20), None)
    profiled = seen.tiles[0]
    seen.tiles.clear()
    requests = [bench.request(n, "<image>", [picture(n, 112, 2)], max_tokens=2) for n in range(12)]
    (features,) = {request.items[0].layout.num_tokens for request in requests}
    (tiles,) = {len(request.items[0].tensors["pixel_values"]) for request in requests}
    assert 527 // features * tiles > profiled, "or this shows nothing"
    bench.run(requests)
    largest = profiled // tiles * tiles
    assert seen.tiles == [largest, 12 * tiles - largest]
