"""A family without a layout: served, not planned; what its senders claim is checked after the encoder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from diptych.v1 import executor_pb2, preprocess_pb2, tensor_pb2
from registry.fingerprint import fingerprint
from tests.checkpoints import make_llava_checkpoint, write_json
from tests.executor_service.peer import Peer, Planned, Planner
from tests.integration.conftest import Reference, picture_bytes, prompt_request
from tests.integration.test_bad_input import failure
from tests.services import Stack, stack

PLUGIN = {"plugin": "tests.plugins.by_hand"}


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    return make_llava_checkpoint(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def handmade(tmp_path_factory) -> Iterator[Stack]:
    path = make_llava_checkpoint(tmp_path_factory.mktemp("by-hand"))
    config = json.loads((path / "config.json").read_text("utf-8"))
    write_json(path / "config.json", {**config, "architectures": ["ByHandForConditionalGeneration"]})
    with stack(path, executor={**PLUGIN, "max_num_batched_tokens": 40}, preprocess=PLUGIN) as services:
        yield services
        services.check_idle()


CASES = [("no picture", 0), ("<image> what", 1), ("a <image> b <image><image>", 3)]


@pytest.mark.parametrize(("text", "count"), CASES)
def test_tokens_are_those_of_transformers(handmade, llava, text: str, count: int) -> None:
    pictures = [picture_bytes(seed, 30 + 20 * seed, 70) for seed in range(count)]
    responses = list(handmade.stub.Generate(prompt_request(text, pictures), timeout=60))
    tokens = [token for response in responses for token in response.token_ids]
    assert tokens == Reference(llava).generate(text, pictures, 10)
    assert responses[-1].final.usage.image_tokens == 16 * count
    assert (responses[-1].final.times.map_seconds > 0) == bool(count)


def test_plan_is_not_there(handmade) -> None:
    request = preprocess_pb2.PlanRequest(prompt=prompt_request("<image>", [picture_bytes(1)]).prompt)
    status, message, facts = failure(lambda: handmade.stub.Plan(request))
    assert (status, facts["stage"], facts["item"]) == ("UNIMPLEMENTED", "plan", "0")
    assert message == (
        "item 0: ByHandForConditionalGeneration has no layout for image, so these items cannot be planned from their "
        "headers"
    )
    text = preprocess_pb2.PlanRequest(prompt=prompt_request("hi", []).prompt)
    assert handmade.stub.Plan(text).prompt_token_ids


def test_a_broken_file_is_found_before_the_executor_hears_of_it(handmade) -> None:
    data = picture_bytes(1, 200, 200)
    request = prompt_request("<image><image>", [picture_bytes(1), data[: len(data) // 2]])
    status, _, facts = failure(lambda: list(handmade.stub.Generate(request)))
    assert (status, facts["stage"], facts["item"]) == ("INVALID_ARGUMENT", "decode", "1")


# --- peers that lie -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planner(handmade) -> Planner:
    family = handmade.executor.front.family
    return Planner(family, fingerprint(family).digest)


def redescribe(planned: Planned, array: np.ndarray, dtype: int = tensor_pb2.D_TYPE_FLOAT32, **changes) -> None:
    """Announce and send another tensor."""
    tensor = planned.start.items[0].tensors[0]
    tensor.dtype, tensor.shape[:] = dtype, array.shape
    tensor.chunks.total_bytes = array.nbytes
    for name, value in changes.items():
        setattr(tensor, name, value)
    planned.tensors[0] = array


def tiles(count: int) -> np.ndarray:
    return np.ones((count, 3, 56, 56), np.float32)


ENCODED = {
    "two tiles": (lambda p: redescribe(p, tiles(2)), "the encoder makes 32 features of the image item at token "),
    "another keyword": (
        lambda p: redescribe(p, tiles(1), name="pixels"),
        "does not take the item's tensors: TypeError",
    ),
    "another shape": (lambda p: redescribe(p, np.ones((5, 7), np.float32)), "does not take the item's tensors"),
}


@pytest.mark.parametrize("lie", ENCODED)
def test_a_lie_that_only_the_encoder_sees_fails_its_request_alone(handmade, planner, lie: str) -> None:
    change, text = ENCODED[lie]
    good, bad = planner.plan(), planner.plan()
    change(bad)
    with Peer(handmade.executor_channel) as peer:
        for handle, planned in ((1, good), (2, bad)):
            peer.start(handle, planned)
        for handle, planned in ((1, good), (2, bad)):
            peer.wait_credit(handle)
            peer.send_tensors(handle, planned)
        answer = peer.finish(2)
        assert (answer.code.name, answer.facts["stage"]) == ("INVALID_ARGUMENT", "encode")
        assert text in answer.status.message
        assert len(peer.finish(1).tokens) == 8
        assert peer.run(3, planner.plan()).tokens == peer.answers[1].tokens


def set_range(start: executor_pb2.Start, **values: int) -> None:
    for name, value in values.items():
        setattr(start.items[0].placeholder, name, value)


def widen(start: executor_pb2.Start) -> None:
    """33 places where at most 32 features are known."""
    del start.prompt_token_ids[start.items[0].placeholder.offset + 16 :]
    start.prompt_token_ids.extend([3] * 17)
    set_range(start, length=33)


def set_tensor(start: executor_pb2.Start, **values) -> None:
    tensor = start.items[0].tensors[0]
    for name, value in values.items():
        if name == "shape":
            tensor.shape[:] = value
        else:
            setattr(tensor, name, value)


ATTESTED = {
    "no tensors": (lambda s: s.items[0].ClearField("tensors"), "has 0 tensors; 1 to 32"),
    "a name twice": (lambda s: s.items[0].tensors.append(s.items[0].tensors[0]), "has 2 tensors; 1 to 32 with names"),
    "no keyword": (lambda s: set_tensor(s, name="a b"), "has a tensor named 'a b'; a keyword is expected"),
    "dtype": (lambda s: set_tensor(s, dtype=99), "claims dtype 99 for pixel_values"),
    "negative shape": (lambda s: set_tensor(s, shape=[-1, -3]), "claims shape [-1, -3] for pixel_values"),
    "overflowing shape": (lambda s: set_tensor(s, shape=[2**62, 2**62]), "claims shape [46116860184"),
    "nine axes": (lambda s: set_tensor(s, shape=[1] * 9), "at most 8 axes"),
    "bytes": (lambda s: set_tensor(s, shape=[1, 3, 56, 57]), "announces 37632 bytes for pixel_values; its shape has"),
    "too many places": (widen, "has 33 places for features; at most 32 are allowed"),
    "no tokens": (lambda s: set_range(s, length=0), "claims no tokens"),
    "range out of bounds": (lambda s: set_range(s, offset=4000), "must lie between"),
    "token id": (lambda s: s.prompt_token_ids.__setitem__(s.items[0].placeholder.offset, 99999), "has token 99999"),
    "features outside": (lambda s: set_range(s, length=3), "outside of every item's range"),
}


@pytest.mark.parametrize("lie", ATTESTED)
def test_claims_out_of_bounds_are_refused_at_once(handmade, planner, lie: str) -> None:
    change, text = ATTESTED[lie]
    planned = planner.plan()
    change(planned.start)
    with Peer(handmade.executor_channel) as peer:
        peer.start(1, planned)
        answer = peer.finish(1)
    assert (answer.code.name, answer.facts["stage"]) == ("INVALID_ARGUMENT", "attest")
    assert text in answer.status.message


def test_more_bytes_than_there_are(handmade, planner) -> None:
    planned = planner.plan()
    set_tensor(planned.start, shape=[1 << 34])
    planned.start.items[0].tensors[0].chunks.total_bytes = 1 << 36
    with Peer(handmade.executor_channel) as peer:
        peer.start(1, planned)
        assert "bytes; at most" in peer.finish(1).status.message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(handmade, planner: Planner, value: float) -> None:
    """One of them would spread through the whole batch."""
    planned = planner.plan("<image> and <image>", sizes=((60, 80), (30, 40)))
    planned.tensors[1] = planned.tensors[1].copy()
    planned.tensors[1].flat[-1] = value
    with Peer(handmade.executor_channel) as peer:
        honest = peer.run(1, planner.plan()).tokens
        meanwhile = planner.plan()
        peer.start(4, meanwhile)
        peer.wait_credit(4)
        answer = peer.run(2, planned)
        assert answer.code.name == "INVALID_ARGUMENT"
        assert (answer.facts["stage"], answer.facts["item"]) == ("receive", "1")
        assert answer.status.message == "item 1: pixel_values has values that are not finite"
        peer.send_tensors(4, meanwhile)
        assert peer.finish(4).tokens == honest, "another request, in the middle of its transfer"
        assert peer.run(3, planner.plan()).tokens == honest
    handmade.check_idle()


def test_bools_that_are_none(handmade, planner: Planner) -> None:
    """Where no layout says the dtype a sender may claim bool, and its bytes must be."""
    planned = planner.plan()
    planned.tensors[0] = np.full((3, 5), 2, dtype=np.uint8)
    set_tensor(planned.start, dtype=tensor_pb2.D_TYPE_BOOL, shape=[3, 5])
    planned.start.items[0].tensors[0].chunks.total_bytes = 15
    with Peer(handmade.executor_channel) as peer:
        honest = peer.run(1, planner.plan()).tokens
        meanwhile = planner.plan()
        peer.start(4, meanwhile)
        peer.wait_credit(4)
        answer = peer.run(2, planned)
        assert answer.code.name == "INVALID_ARGUMENT"
        assert (answer.facts["stage"], answer.facts["item"]) == ("receive", "0")
        assert answer.status.message == "item 0: pixel_values has values that are neither 0 nor 1"
        peer.send_tensors(4, meanwhile)
        assert peer.finish(4).tokens == honest, "another request, in the middle of its transfer"
        assert peer.run(3, planner.plan()).tokens == honest
    handmade.check_idle()
