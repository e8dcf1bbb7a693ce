"""`Execute` over the wire, against a real executor: honest peers, and peers that go away.

What no honest peer sends is in test_hostile_messages.py and test_hostile_peers.py.
"""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from diptych.v1 import tensor_pb2
from executor_service.engine.messages import Abort, FinishReason, StepEnd
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


def test_a_false_size_with_the_same_layout_is_accepted(channel, planner, expected) -> None:
    planned = planner.plan()
    planned.start.items[0].info.height += 1
    with Peer(channel) as peer:
        assert peer.run(3, planned).tokens == expected


def test_cancel_while_receiving_and_while_generating(channel, planner) -> None:
    with Peer(channel) as peer:
        peer.start(1, planner.plan())
        peer.wait_credit(1)
        peer.cancel(1)
        assert peer.finish(1).code is grpc.StatusCode.CANCELLED
        peer.begin_generating(2, planner.plan(max_tokens=1000))
        peer.cancel(2)
        answer = peer.finish(2)
        assert (answer.code, answer.facts["stage"]) == (grpc.StatusCode.CANCELLED, "generate")
        assert len(answer.tokens) < 1000


def test_a_stop_ends_an_answer_well(channel, planner) -> None:
    planned = planner.plan(max_tokens=1000)
    with Peer(channel) as peer:
        peer.run(1, planner.plan(max_tokens=1))
        peer.begin_generating(2, planned)
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


def test_what_the_engine_makes_after_a_stop_is_nobodys(channel, planner, server, reports, monkeypatch) -> None:
    """Here it is not told: it goes on to the end, of which the peer hears no token and no reason."""
    link = server[0].front._link
    send = link.send
    monkeypatch.setattr(link, "send", lambda message: None if isinstance(message, Abort) else send(message))
    with Peer(channel) as peer:
        peer.start(1, planner.plan("no picture", sizes=(), max_tokens=300))
        while len(peer._answer(1).tokens) < 5:
            peer.read()
        peer.stop(1)
        (final,) = peer.finish(1).finals
    assert final.completion.finish_reason == tensor_pb2.FINISH_REASON_STOP
    num_made = sum(report.num_tokens for report in reports)
    assert final.completion.usage.completion_tokens == len(peer.answers[1].tokens) < num_made


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


@pytest.mark.parametrize("stage", ["opened", "started", "credited", "sending", "sent", "generating", "half-closed"])
def test_client_gone_at_every_stage(channel, planner, scene, stage: str) -> None:
    """The other streams of `scene` go on undisturbed."""
    planned = planner.plan(max_tokens=1000)
    with Peer(channel) as peer:
        if stage == "opened":
            return
        peer.start(1, planned)
        if stage == "started":
            return
        peer.wait_credit(1)
        if stage == "sending":
            peer.send_chunk(1, 0, 0, 0, bytes(100))
        if stage in ("sent", "generating", "half-closed"):
            peer.send_tensors(1, planned)
        if stage == "generating":
            while not peer.answers[1].tokens:
                peer.read()
        if stage == "half-closed":
            peer.half_close()


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
