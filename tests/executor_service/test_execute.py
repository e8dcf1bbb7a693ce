"""`Execute` over the wire, against a real executor: honest peers, lying peers, and peers that go away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import pytest

from diptych.v1 import executor_pb2, tensor_pb2
from executor_service.engine.messages import FinishReason, StepEnd
from tests.checkpoints import VOCAB_SIZE
from tests.executor_service.peer import Peer, Planned, model_facts
from tests.services import wait_idle


@pytest.fixture(scope="module")
def executor_settings() -> dict[str, Any]:
    return {"media_memory": "1MiB"}


@pytest.fixture
def expected(channel, planner) -> list[int]:
    with Peer(channel) as peer:
        return peer.run(0, planner.plan()).tokens


def test_model_facts(channel, planner) -> None:
    facts = model_facts(channel)
    assert facts.fingerprint.digest == planner.fingerprint
    assert facts.limits.max_items_per_prompt == {"image": 4}
    assert facts.limits.max_tokens_per_item == {"image": 16}
    (normalization,) = facts.normalizations
    assert normalization.tensor_name == "pixel_values"
    assert len(normalization.mean) == len(normalization.std) == 3
    ledger = facts.memory_ledger
    assert ledger.kv_cache_bytes == ledger.num_blocks * ledger.block_bytes > 0
    assert ledger.weights_bytes > 100_000
    assert ledger.other_bytes > 50_000_000  # an interpreter with torch
    assert ledger.vision_peak_bytes > 0
    assert ledger.language_peak_bytes > 0
    assert not ledger.peaks_used_for_sizing


def test_many_requests_on_one_stream(channel, planner, expected) -> None:
    plans = {handle: planner.plan() for handle in range(10)}
    with Peer(channel) as peer:
        for handle, planned in plans.items():
            peer.start(handle, planned)
        for handle, planned in plans.items():
            assert peer.wait_credit(handle).missing == [0]
            peer.send_tensors(handle, planned)
        for handle, planned in plans.items():
            answer = peer.finish(handle)
            assert answer.tokens == expected
            usage = answer.finals[0].completion.usage
            assert (usage.image_tokens, usage.completion_tokens) == (16, len(expected))
            assert usage.prompt_tokens == len(planned.start.prompt_token_ids)


def test_half_closed_stream_is_answered_to_its_end(channel, planner, expected) -> None:
    planned = planner.plan()
    with Peer(channel) as peer:
        peer.start(5, planned)
        peer.wait_credit(5)
        peer.send_tensors(5, planned)
        peer.half_close()
        assert peer.finish(5).tokens == expected
        with pytest.raises(StopIteration):
            next(peer.call)


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


LIES = {
    "fingerprint": (lambda s: setattr(s, "fingerprint", b"x" * 32), "FAILED_PRECONDITION", "handshake", "disagree"),
    "dtype": (set_tensor(dtype=tensor_pb2.D_TYPE_FLOAT32), "INVALID_ARGUMENT", "attest", "must be uint8"),
    "unknown dtype": (set_tensor(dtype=99), "INVALID_ARGUMENT", "attest", "dtype 99"),
    "shape": (set_tensor(shape=[3, 56, 57]), "INVALID_ARGUMENT", "attest", "must be [3, 56, 56]"),
    "turned shape": (set_tensor(shape=[56, 3, 56]), "INVALID_ARGUMENT", "attest", "must be [3, 56, 56]"),
    "negative shape": (set_tensor(shape=[3, -56, -56]), "INVALID_ARGUMENT", "attest", "must be [3, 56, 56]"),
    "overflowing shape": (set_tensor(shape=[2**62, 2**62, 4]), "INVALID_ARGUMENT", "attest", "must be [3, 56, 56]"),
    "bytes": (set_tensor(total_bytes=17), "INVALID_ARGUMENT", "attest", "announces 17 bytes"),
    "tensor name": (set_tensor(name="pixels"), "INVALID_ARGUMENT", "attest", "pixel_values are expected"),
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
    "modality": (lambda s: setattr(s.items[0].info, "modality", 7), "INVALID_ARGUMENT", "attest", "not known"),
    "other modality": (
        lambda s: setattr(s.items[0].info, "modality", tensor_pb2.MODALITY_AUDIO),
        "INVALID_ARGUMENT", "attest", "does not support audio",
    ),
    "no size": (lambda s: s.items[0].info.ClearField("height"), "INVALID_ARGUMENT", "attest", "lacks its height"),
    "zero size": (lambda s: setattr(s.items[0].info, "width", 0), "INVALID_ARGUMENT", "attest", "lacks its height"),
    "huge size": (lambda s: setattr(s.items[0].info, "width", 99999), "INVALID_ARGUMENT", "attest", "at most 8192"),
    "missing item": (lambda s: s.ClearField("items"), "INVALID_ARGUMENT", "attest", "outside of every item's range"),
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
def test_a_lie_is_refused_and_disturbs_nobody(channel, planner, expected, lie: str) -> None:
    change, code, stage, text = LIES[lie]
    planned = planner.plan()
    change(planned.start)
    with Peer(channel) as peer:
        good = planner.plan()
        peer.start(1, good)
        peer.wait_credit(1)
        peer.start(2, planned)
        answer = peer.finish(2)
        assert answer.code.name == code
        assert answer.facts["stage"] == stage
        assert text in answer.status.message
        peer.send_tensors(1, good)
        assert peer.finish(1).tokens == expected
        assert len(answer.finals) == 1


def test_too_many_items(channel, planner) -> None:
    planned = planner.plan("<image>" * 5, sizes=((30, 30),) * 5)
    with Peer(channel) as peer:
        peer.start(1, planned)
        answer = peer.finish(1)
    assert (answer.code.name, answer.facts["limit"], answer.facts["actual"]) == ("INVALID_ARGUMENT", "4", "5")


def test_overlapping_ranges(channel, planner) -> None:
    planned = planner.plan("<image><image>", sizes=((30, 30),) * 2)
    planned.start.items[1].placeholder.offset -= 1
    with Peer(channel) as peer:
        peer.start(1, planned)
        assert "without overlap" in peer.finish(1).status.message


def test_a_false_size_with_the_same_layout_is_accepted(channel, planner, expected) -> None:
    planned = planner.plan()
    planned.start.items[0].info.height += 1
    with Peer(channel) as peer:
        assert peer.run(3, planned).tokens == expected


BAD_CHUNKS = {
    "beyond the end": (0, 0, 0, 56 * 56 * 3 + 1, "reaches to byte"),
    "out of order": (0, 0, 100, 50, "byte 0 is next"),
    "no such item": (1, 0, 0, 50, "the request has 1 items"),
    "no such tensor": (0, 1, 0, 50, "the item has 1 tensors"),
    "empty": (0, 0, 0, 0, "a chunk has 0 bytes"),
    "overflowing offset": (0, 0, 2**64 - 1, 50, "byte 0 is next"),
}


@pytest.mark.parametrize("kind", BAD_CHUNKS)
def test_a_bad_chunk_ends_its_request_alone(channel, planner, expected, kind: str) -> None:
    item, tensor, offset, size, text = BAD_CHUNKS[kind]
    good, bad = planner.plan(), planner.plan()
    with Peer(channel) as peer:
        peer.start(1, good)
        peer.start(2, bad)
        peer.wait_credit(1)
        peer.wait_credit(2)
        peer.send_chunk(2, item, tensor, offset, b"x" * size)
        answer = peer.finish(2)
        assert (answer.code.name, answer.facts["stage"]) == ("INVALID_ARGUMENT", "receive")
        assert text in answer.status.message
        peer.send_tensors(2, bad)
        peer.send_tensors(1, good)
        assert peer.finish(1).tokens == expected
        assert len(answer.finals) == 1


def test_a_chunk_twice(channel, planner) -> None:
    with Peer(channel) as peer:
        peer.start(1, planner.plan())
        peer.wait_credit(1)
        for _ in range(2):
            peer.send_chunk(1, 0, 0, 0, b"x" * 100)
        assert "byte 100 is next" in peer.finish(1).status.message


def test_a_chunk_or_a_cancel_without_start(channel) -> None:
    with Peer(channel) as peer:
        peer.send_chunk(77, 0, 0, 0, b"x")
        peer.cancel(78)
        assert "was not started" in peer.finish(77).status.message
        assert "was not started" in peer.finish(78).status.message


def test_a_handle_started_twice(channel, planner) -> None:
    with Peer(channel) as peer:
        peer.start(1, planner.plan())
        peer.start(1, planner.plan())
        assert "while it was live" in peer.finish(1).status.message
        assert peer.run(1 + 1, planner.plan()).finals


def test_cancel_while_receiving_and_while_generating(channel, planner) -> None:
    with Peer(channel) as peer:
        peer.start(1, planner.plan())
        peer.wait_credit(1)
        peer.cancel(1)
        assert peer.finish(1).code is grpc.StatusCode.CANCELLED
        planned = planner.plan(max_tokens=1000)
        peer.start(2, planned)
        peer.wait_credit(2)
        peer.send_tensors(2, planned)
        while not peer.answers[2].tokens:
            peer.read()
        peer.cancel(2)
        answer = peer.finish(2)
        assert (answer.code, answer.facts["stage"]) == (grpc.StatusCode.CANCELLED, "generate")
        assert len(answer.tokens) < 1000


def test_a_stop_ends_an_answer_well(channel, planner) -> None:
    planned = planner.plan(max_tokens=1000)
    with Peer(channel) as peer:
        peer.run(1, planner.plan(max_tokens=1))
        peer.start(2, planned)
        peer.wait_credit(2)
        peer.send_tensors(2, planned)
        while not peer.answers[2].tokens:
            peer.read()
        peer.stop(2)
        peer.stop(2)
        (final,) = peer.finish(2).finals
        tokens = peer.answers[2].tokens
        assert final.completion.finish_reason == tensor_pb2.FINISH_REASON_STOP
        assert final.completion.usage.completion_tokens == len(tokens) < 1000
        length = len(planned.start.prompt_token_ids)
        assert final.completion.usage.prompt_tokens == length
        assert final.completion.usage.cached_tokens == (length - 1) // 16 * 16 > 0
        assert final.completion.times.generate_seconds > 0
        assert peer.run(3, planner.plan(max_tokens=len(tokens))).tokens == tokens


def test_a_stop_before_the_first_token_is_a_cancel(channel, planner) -> None:
    with Peer(channel) as peer:
        peer.start(1, planner.plan())
        peer.wait_credit(1)
        peer.stop(1)
        answer = peer.finish(1)
        assert (answer.code, answer.facts["stage"]) == (grpc.StatusCode.CANCELLED, "receive")
        peer.stop(77)
        answer = peer.finish(77)
        assert (answer.code, "was not started" in answer.status.message) == (grpc.StatusCode.INVALID_ARGUMENT, True)
        assert peer.run(2, planner.plan()).tokens


@pytest.fixture
def reports(server, monkeypatch) -> list[StepEnd]:
    """What the engine reports from now on."""
    seen: list[StepEnd] = []
    link = server[0].front._link
    real = link._on_step_end

    def noted(report: StepEnd) -> None:
        seen.append(report)
        real(report)

    monkeypatch.setattr(link, "_on_step_end", noted)
    return seen


ENDINGS = ("cancel", "stop", "deadline", "stream")


@pytest.mark.parametrize("ending", ENDINGS)
def test_who_ends_a_request_ends_it_in_the_engine(channel, planner, server, reports, ending: str) -> None:
    """The engine is told, and does not go on to the last token for nobody."""
    planned = planner.plan("no picture", sizes=(), max_tokens=1500)
    if ending == "deadline":
        planned.start.time_left.FromMilliseconds(300)
    with Peer(channel) as peer:
        peer.start(1, planned)
        while not peer._answer(1).tokens:
            peer.read()
        if ending == "cancel":
            peer.cancel(1)
        if ending == "stop":
            peer.stop(1)
        if ending != "stream":
            peer.finish(1)
    wait_idle(channel, *server)
    ends = [finished for report in reports for finished in report.finished]
    assert [finished.reason for finished in ends] == [FinishReason.ABORTED]
    assert sum(report.num_tokens for report in reports) < 1500


def test_a_steps_tokens_are_one_message_per_stream(channel, planner, reports) -> None:
    """Whatever the number of requests; each stream gets its own handles and no others."""
    num_tokens, handles, others = 60, [3, 900, 70000, 2**32 - 1], [3, 5]
    planned = planner.plan("no picture", sizes=(), max_tokens=num_tokens)
    with Peer(channel) as peer, Peer(channel) as other:
        for handle in handles:
            peer.start(handle, planned)
        for handle in others:
            other.start(handle, planned)
        for handle in handles:
            peer.finish(handle)
        for handle in others:
            other.finish(handle)
    for stream, own in ((peer, handles), (other, others)):
        assert len(stream.packed) <= len(reports)
        assert max(map(len, stream.packed)) == len(own), "they all run at once"
        assert all(len(set(packed)) == len(packed) for packed in stream.packed), "one token each per step"
        assert sorted(handle for packed in stream.packed for handle in packed) == sorted(own * num_tokens)


def test_the_last_token_is_sent_before_its_request_is_closed(channel, planner, server, monkeypatch) -> None:
    front = server[0].front
    unsent: list[int] = []
    real = front._close

    def noted(request: Any, finished: Any = None) -> None:
        unsent.append(len(request.outlet._outgoing) + len(request.outlet._handles))
        real(request, finished)

    monkeypatch.setattr(front, "_close", noted)
    with Peer(channel) as peer:
        peer.start(1, planner.plan("no picture", sizes=(), max_tokens=1))
        assert len(peer.finish(1).tokens) == 1
    assert unsent == [0]


def test_deadline_names_the_stage(channel, planner) -> None:
    waiting, generating = planner.plan(), planner.plan("no picture", sizes=(), max_tokens=1500)
    for planned in (waiting, generating):
        planned.start.time_left.FromMilliseconds(300)
    with Peer(channel) as peer:
        peer.start(1, waiting)
        peer.start(2, generating)
        for handle, stage in ((1, "receive"), (2, "generate")):
            answer = peer.finish(handle)
            assert (answer.code, answer.facts["stage"]) == (grpc.StatusCode.DEADLINE_EXCEEDED, stage)


def test_client_gone_at_every_stage(channel, planner, expected) -> None:
    planned = planner.plan(max_tokens=1000)
    for stage in range(4):
        with Peer(channel) as peer:
            peer.start(1, planned)
            if stage >= 1:
                peer.wait_credit(1)
            if stage == 2:
                peer.send_chunk(1, 0, 0, 0, bytes(100))
            if stage == 3:
                peer.send_tensors(1, planned)
                while not peer.answers[1].tokens:
                    peer.read()
    with Peer(channel) as peer:
        assert peer.run(1, planner.plan()).tokens == expected


def test_requests_wait_for_room_in_the_arena(channel, planner, expected) -> None:
    """1 MiB holds 111 tiles: the rest waits for credit, and all are answered."""
    plans: dict[int, Planned] = {handle: planner.plan(max_tokens=8) for handle in range(150)}
    with Peer(channel) as peer:
        for handle, planned in plans.items():
            peer.start(handle, planned)
        for handle, planned in plans.items():
            peer.wait_credit(handle)
            peer.send_tensors(handle, planned)
        assert all(peer.finish(handle).tokens == expected for handle in plans)
