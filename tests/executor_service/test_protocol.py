"""The executor model protocol: what a model lacks is said before anything runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from executor_service.engine.messages import SamplingParams
from executor_service.engine.request import Request
from executor_service.layers import Attention
from executor_service.models.protocol import check_model_class, check_required_keywords, kv_geometry, load_model_class
from registry import MULTIMODAL_REGISTRY, SupportsMultiModal
from registry.family import ModelFamily


class Complete(nn.Module):
    def get_input_embeddings(self): ...

    def embed_multimodal(self, pixel_values): ...

    def forward(self, input_ids, positions, inputs_embeds): ...

    def compute_logits(self, rows): ...


@pytest.mark.parametrize("method", ["get_input_embeddings", "embed_multimodal", "compute_logits"])
def test_a_missing_method_is_named(method: str) -> None:
    members = {name: value for name, value in vars(Complete).items() if name != method and not name.startswith("__")}
    with pytest.raises(TypeError, match=f"Partial lacks the method {method}"):
        check_model_class(type("Partial", (nn.Module,), members), ["pixel_values"])


def test_a_missing_keyword_is_named() -> None:
    check_model_class(Complete, ["pixel_values"])
    with pytest.raises(TypeError, match="does not take image_sizes, which the layout emits; it takes pixel_values"):
        check_model_class(Complete, ["pixel_values", "image_sizes"])


def test_a_keyword_that_nothing_gives_is_named() -> None:
    class Needs(Complete):
        def embed_multimodal(self, pixel_values, masks=None, *, sizes, **others): ...

    check_required_keywords(Needs, ["pixel_values", "sizes"])
    message = "Needs.embed_multimodal requires sizes, which no layout emits; the layouts emit pixel_values$"
    with pytest.raises(TypeError, match=message):
        check_required_keywords(Needs, ["pixel_values"])


def test_any_keyword_is_fine() -> None:
    class Open(Complete):
        def embed_multimodal(self, **tensors): ...

    check_model_class(Open, ["anything"])


def test_bidirectional_spans_come_from_a_method() -> None:
    class Spans(Complete):
        bidirectional_spans = True

    with pytest.raises(TypeError, match=r"Spans\.bidirectional_spans is to be a method"):
        check_model_class(Spans, [])


@pytest.mark.parametrize(
    ("name", "text"),
    [(None, "package.module:Class"), ("no_colon", "package.module:Class"), ("not.there:Model", "cannot load"),
     ("executor_service.models.llava:Nothing", "cannot load"), (5, "package.module:Class"),
     ("tests.cli.no_model:Model", "cannot load .*: ZeroDivisionError: division by zero")],
)  # fmt: skip
def test_an_executor_model_that_cannot_be_loaded(name: object, text: str) -> None:
    @MULTIMODAL_REGISTRY.register_image_layout(lambda ctx, media: None)
    class Family(SupportsMultiModal):
        executor_model = name

    with pytest.raises(TypeError, match=text):
        load_model_class(ModelFamily(Family, ctx=None))


def test_geometry_comes_from_attention_modules() -> None:
    model = nn.ModuleList([Attention(i, 8, 2, 16) for i in range(3)])
    geometry = kv_geometry(model, None)
    assert (geometry.num_layers, geometry.num_kv_heads, geometry.head_dim) == (3, 2, 16)
    model.append(Attention(3, 8, 4, 16))
    with pytest.raises(TypeError, match="different KV shapes"):
        kv_geometry(model, None)


def test_attention_outside_of_a_batch_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="outside of forward_context"):
        Attention(0, 2, 1, 4)(torch.zeros(1, 2, 4), torch.zeros(1, 1, 4), torch.zeros(1, 1, 4))


@pytest.mark.parametrize("axes", [(), (3,)])
def test_positions_continue_behind_the_prompt(axes: tuple[int, ...]) -> None:
    given = np.broadcast_to(np.array([0, 1, 1, 1, 2]), (*axes, 5))
    request = Request(0, [1] * 5, [], SamplingParams(max_tokens=5), 100, positions=given, decode_delta=-2)
    assert request.positions(0, 5).tolist() == given.tolist()
    assert request.positions(3, 8)[..., :].reshape(-1, 5)[0].tolist() == [1, 2, 3, 4, 5]
    assert request.positions(7, 9).shape == (*axes, 2)
    assert request.positions(7, 9).reshape(-1, 2)[0].tolist() == [5, 6]
