"""Messages that no honest sender sends: each ends its request, with the reason, and nobody else notices.

Every test has a `scene`: honest requests in the middle of their transfer, on the same stream and on another. They are
answered as always, so are the next ones, and afterwards everything is free and whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest

from diptych.v1 import executor_pb2, tensor_pb2
from tests.checkpoints import VOCAB_SIZE
from tests.executor_service.peer import Planned, Planner
from tests.executor_service.scene import Scene


@pytest.fixture(scope="module")
def executor_settings() -> dict[str, Any]:
    return {"media_memory": "1MiB"}


def set_tensor(**values: object) -> Callable[[executor_pb2.Start], None]:
    def change(start: executor_pb2.Start) -> None:
        tensor = start.items[0].tensors[0]
        for name, value in values.items():
            if name == "shape":
                tensor.shape[:] = value
            elif name == "total_bytes":
                tensor.chunks.total_bytes = value
            else:
                setattr(tensor, name, value)

    return change


def set_token(index: int, value: int) -> Callable[[executor_pb2.Start], None]:
    def change(start: executor_pb2.Start) -> None:
        start.prompt_token_ids[index] = value

    return change


def add_tensor(name: str) -> Callable[[executor_pb2.Start], None]:
    def change(start: executor_pb2.Start) -> None:
        extra = start.items[0].tensors.add()
        extra.CopyFrom(start.items[0].tensors[0])
        extra.name = name

    return change


def lengthen(start: executor_pb2.Start) -> None:
    """One placeholder token too many, with a range that covers it."""
    place = start.items[0].placeholder
    start.prompt_token_ids.insert(place.offset, start.prompt_token_ids[place.offset])
    place.length += 1


LIES = {
    "fingerprint": (lambda s: setattr(s, "fingerprint", b"x" * 32), "FAILED_PRECONDITION", "handshake", "disagree"),
    "dtype": (set_tensor(dtype=tensor_pb2.D_TYPE_FLOAT32), "INVALID_ARGUMENT", "attest", "must be uint8"),
    "unknown dtype": (set_tensor(dtype=99), "INVALID_ARGUMENT", "attest", "dtype 99"),
    "shape": (set_tensor(shape=[3, 56, 57]), "INVALID_ARGUMENT", "attest", "must be [3, 56, 56]"),
    "turned shape": (set_tensor(shape=[56, 3, 56]), "INVALID_ARGUMENT", "attest", "must be [3, 56, 56]"),
    "negative shape": (set_tensor(shape=[3, -56, -56]), "INVALID_ARGUMENT", "attest", "must be [3, 56, 56]"),
    "overflowing shape": (set_tensor(shape=[2**62, 2**62, 4]), "INVALID_ARGUMENT", "attest", "must be [3, 56, 56]"),
    **{
        f"odd shape {shape}": (set_tensor(shape=shape), "INVALID_ARGUMENT", "attest", "must be [3, 56, 56]")
        for shape in ([0, 56, 56], [3, 56], [3, 56, 56, 1], [], [3, 56, 56, 0])
    },
    "bytes": (set_tensor(total_bytes=17), "INVALID_ARGUMENT", "attest", "announces 17 bytes"),
    "tensor name": (set_tensor(name="pixels"), "INVALID_ARGUMENT", "attest", "pixel_values are expected"),
    "no tensor name": (set_tensor(name=""), "INVALID_ARGUMENT", "attest", "pixel_values are expected"),
    "tensor twice": (
        add_tensor("pixel_values"), "INVALID_ARGUMENT", "attest",
        "has tensors pixel_values, pixel_values; pixel_values are expected",
    ),
    "one more tensor": (
        add_tensor("mask"), "INVALID_ARGUMENT", "attest", "has tensors pixel_values, mask; pixel_values are expected",
    ),
    "no tensors": (lambda s: s.items[0].ClearField("tensors"), "INVALID_ARGUMENT", "attest", "has tensors none"),
    "range out of bounds": (
        lambda s: setattr(s.items[0].placeholder, "offset", 4000), "INVALID_ARGUMENT", "attest", "must lie between",
    ),
    "range over other tokens": (
        lambda s: setattr(s.items[0].placeholder, "offset", 0), "INVALID_ARGUMENT", "attest", "not its replacement",
    ),
    "length": (
        lambda s: setattr(s.items[0].placeholder, "length", 15), "INVALID_ARGUMENT", "attest", "claims 15 tokens",
    ),
    "one token too many": (lengthen, "INVALID_ARGUMENT", "attest", "claims 17 tokens; its size gives 16"),
    "modality": (lambda s: setattr(s.items[0].info, "modality", 7), "INVALID_ARGUMENT", "attest", "not known"),
    "other modality": (
        lambda s: setattr(s.items[0].info, "modality", tensor_pb2.MODALITY_AUDIO),
        "INVALID_ARGUMENT", "attest", "does not support audio",
    ),
    "no size": (lambda s: s.items[0].info.ClearField("height"), "INVALID_ARGUMENT", "attest", "lacks its height"),
    "zero size": (lambda s: setattr(s.items[0].info, "width", 0), "INVALID_ARGUMENT", "attest", "lacks its height"),
    "huge size": (lambda s: setattr(s.items[0].info, "width", 99999), "INVALID_ARGUMENT", "attest", "at most 8192"),
    "missing item": (lambda s: s.ClearField("items"), "INVALID_ARGUMENT", "attest", "outside of every item's range"),
    "first token id": (
        set_token(0, VOCAB_SIZE),
        "INVALID_ARGUMENT", "admit", f"token 0 of the prompt is {VOCAB_SIZE}; the vocabulary has",
    ),
    "negative token id": (
        # What a sender makes of -1 whose field is signed: the ten bytes of a negative varint.
        lambda s: s.MergeFromString(b"\x1a\x0a" + b"\xff" * 9 + b"\x01"),
        "INVALID_ARGUMENT", "admit", f"is {2**32 - 1}; the vocabulary has",
    ),
    "token id": (set_token(0, 2**32 - 1), "INVALID_ARGUMENT", "admit", "the vocabulary has"),
    "no prompt": (lambda s: s.ClearField("prompt_token_ids"), "INVALID_ARGUMENT", "admit", "no tokens"),
    "too long": (lambda s: s.prompt_token_ids.extend([5] * 3000), "INVALID_ARGUMENT", "admit", "at most 2047"),
    "temperature": (lambda s: setattr(s.sampling, "temperature", -1), "INVALID_ARGUMENT", "admit", "temperature is -1"),
    "nan": (lambda s: setattr(s.sampling, "top_p", float("nan")), "INVALID_ARGUMENT", "admit", "top_p is nan"),
    "stop token": (lambda s: s.sampling.stop_token_ids.append(10**9), "INVALID_ARGUMENT", "admit", "ids are below"),
    "penalty": (lambda s: setattr(s.sampling, "presence_penalty", 9), "INVALID_ARGUMENT", "admit", "penalty is 9"),
    "biased token": (
        lambda s: s.sampling.logit_bias.update({VOCAB_SIZE: 1}), "INVALID_ARGUMENT", "admit", "logit_bias has 328",
    ),
    "bias": (lambda s: s.sampling.logit_bias.update({1: 101}), "INVALID_ARGUMENT", "admit", "logit_bias of token 1"),
    "empty bad word": (lambda s: s.sampling.bad_words.add(), "INVALID_ARGUMENT", "admit", "has 0 ids"),
    "bad word": (
        lambda s: s.sampling.bad_words.add(token_ids=[1, 2**32 - 1]), "INVALID_ARGUMENT", "admit", "ids are below 328",
    ),
    "min tokens": (lambda s: setattr(s.sampling, "min_tokens", 9), "INVALID_ARGUMENT", "admit", "at most max_tokens"),
    "output token": (lambda s: s.output_token_ids.append(10**9), "INVALID_ARGUMENT", "admit", "no text token"),
    "ended output": (
        lambda s: (s.sampling.stop_token_ids.append(9), s.output_token_ids.extend([8, 9])),
        "INVALID_ARGUMENT", "admit", "output_token_ids[1] is 9, which ends an answer",
    ),
    "whole output": (lambda s: s.output_token_ids.extend([9] * 8), "INVALID_ARGUMENT", "admit", "at most 8"),
    "media digest": (
        lambda s: setattr(s.items[0], "media_digest", b"x"), "INVALID_ARGUMENT", "attest", "SHA-256 has 32",
    ),
    "inline bytes": (set_tensor(data=b"x" * 17), "INVALID_ARGUMENT", "attest", "has 17 bytes"),
    "request id": (
        lambda s: setattr(s, "request_id", "x" * 129), "INVALID_ARGUMENT", "admit", "129 characters; at most 128",
    ),
    "frames of an image": (
        lambda s: setattr(s.items[0].info, "num_frames", 7), "INVALID_ARGUMENT", "attest", "claims num_frames 7",
    ),
    "rate of an image": (
        lambda s: setattr(s.items[0].info, "sample_rate", 0), "INVALID_ARGUMENT", "attest", "claims sample_rate 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused(scene: Scene, planner: Planner, lie: str) -> None:
    change, code, stage, text = LIES[lie]
    planned = planner.plan()
    change(planned.start)
    scene.peer.start(1, planned)
    answer = scene.check_refused(1, code, stage, text)
    if stage == "attest" and lie != "missing item":
        assert answer.facts["item"] == "0"


def test_too_many_items(scene: Scene, planner: Planner) -> None:
    scene.peer.start(1, planner.plan("<image>" * 5, sizes=((30, 30),) * 5))
    scene.check_refused(1, "INVALID_ARGUMENT", "attest", "5 image items; at most 4", limit="4", actual="5")


def test_overlapping_ranges(scene: Scene, planner: Planner) -> None:
    planned = planner.plan("<image><image>", sizes=((30, 30),) * 2)
    planned.start.items[1].placeholder.offset -= 1
    scene.peer.start(1, planned)
    scene.check_refused(1, "INVALID_ARGUMENT", "attest", "in order and without overlap", item="1")


# --- chunks ---------------------------------------------------------------------------------------------


BAD_CHUNKS = {
    "beyond the end": (0, 0, 0, 56 * 56 * 3 + 1, "reaches to byte"),
    "out of order": (0, 0, 100, 50, "byte 0 is next"),
    "no such item": (1, 0, 0, 50, "the request has 1 items"),
    "no such tensor": (0, 1, 0, 50, "the item has 1 tensors"),
    "empty": (0, 0, 0, 0, "a chunk has 0 bytes"),
    "overflowing offset": (0, 0, 2**64 - 1, 50, "byte 0 is next"),
}


@pytest.mark.parametrize("kind", BAD_CHUNKS)
def test_a_bad_chunk_ends_its_request(scene: Scene, planner: Planner, kind: str) -> None:
    """What comes behind it was sent before its sender knew, and is ignored."""
    item, tensor, offset, size, text = BAD_CHUNKS[kind]
    planned, peer = planner.plan(), scene.peer
    peer.start(1, planned)
    peer.wait_credit(1)
    peer.send_chunk(1, item, tensor, offset, b"x" * size)
    scene.check_refused(1, "INVALID_ARGUMENT", "receive", text, item=str(item))
    peer.send_tensors(1, planned)


def test_a_chunk_twice(scene: Scene, planner: Planner) -> None:
    scene.peer.start(1, planner.plan())
    scene.peer.wait_credit(1)
    for _ in range(2):
        scene.peer.send_chunk(1, 0, 0, 0, b"x" * 100)
    scene.check_refused(1, "INVALID_ARGUMENT", "receive", "byte 100 is next", item="0")


def offering(planned: Planned, name: str) -> Planned:
    """The request offers its item under the digest of `name`."""
    planned.start.items[0].media_digest = hashlib.sha256(name.encode()).digest()
    return planned


@pytest.mark.parametrize("is_held", [False, True])
def test_a_chunk_of_an_item_of_which_nothing_is_missing(scene: Scene, planner: Planner, is_held: bool) -> None:
    """It has been sent whole, or was here already; the answer that has begun ends, whatever it has said by then."""
    peer, planned = scene.peer, offering(planner.plan(max_tokens=1500), f"held: {is_held}")
    if is_held:
        assert peer.run(1, offering(planner.plan(), f"held: {is_held}")).tokens == scene.expected
    peer.start(2, planned)
    if not is_held:
        peer.wait_credit(2)
        peer.send_tensors(2, planned)
    peer.send_tensors(2, planned)
    answer = peer.finish(2)
    assert (answer.code.name, answer.facts["stage"], answer.facts["item"]) == ("INVALID_ARGUMENT", "receive", "0")
    assert "a chunk is for item 0, of which nothing is missing" in answer.status.message
    assert answer.tokens[:8] == scene.expected[: len(answer.tokens)]


def test_a_chunk_after_a_cancel_is_ignored(scene: Scene, planner: Planner) -> None:
    planned, peer = planner.plan(), scene.peer
    peer.start(1, planned)
    peer.wait_credit(1)
    peer.cancel(1)
    peer.send_tensors(1, planned)
    peer.cancel(1)
    scene.check_refused(1, "CANCELLED", "receive", "the request was cancelled")


# --- handles --------------------------------------------------------------------------------------------


def test_a_message_for_a_request_that_was_not_started(scene: Scene) -> None:
    scene.peer.send_chunk(77, 0, 0, 0, b"x")
    scene.peer.cancel(78)
    scene.peer.stop(79)
    for handle, what in ((77, "a chunk"), (78, "a cancel"), (79, "a stop")):
        text = f"{what} came for handle {handle}, which was not started"
        scene.check_refused(handle, "INVALID_ARGUMENT", "receive", text)


def test_a_handle_started_twice(scene: Scene, planner: Planner) -> None:
    """Which of the two it would mean nobody knows: both end, as one; afterwards the handle is free."""
    for _ in range(2):
        scene.peer.start(1, planner.plan())
    scene.check_refused(1, "INVALID_ARGUMENT", "admit", "handle 1 was started while it was live")
    del scene.peer.answers[1]
    assert scene.peer.run(1, planner.plan()).tokens == scene.expected


def test_equal_request_ids_are_two_requests(scene: Scene, planner: Planner) -> None:
    """They are the sender's names, for logs and traces."""
    plans = {handle: planner.plan() for handle in (1, 2)}
    assert plans[1].start.request_id == plans[2].start.request_id
    for handle, planned in plans.items():
        scene.peer.start(handle, planned)
    for handle, planned in plans.items():
        scene.peer.wait_credit(handle)
        scene.peer.send_tensors(handle, planned)
    assert scene.peer.finish(1).tokens == scene.peer.finish(2).tokens == scene.expected
