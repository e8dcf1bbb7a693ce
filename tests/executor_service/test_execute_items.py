"""Digests, missing items, credit and resumption over the wire, against a real executor."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from diptych.service.lifecycle import CHANNEL_OPTIONS
from diptych.v1 import executor_pb2
from executor_service.engine.messages import Abort, Announce, ToEngine
from executor_service.server import ExecutorServer
from executor_service.settings import ExecutorSettings
from registry import MediaInfo, MediaItem
from registry.fingerprint import fingerprint, fixed_picture
from tests.executor_service.peer import Peer, Planned, Planner
from tests.services import EXECUTOR_DEFAULTS, service_thread

TEXT = "Look: <image> so?"


@pytest.fixture(scope="module")
def executor_settings() -> dict[str, Any]:
    return {"media_memory": "1MiB", "receive_timeout": 1.5}


@pytest.fixture
def counts(server) -> Callable[[], dict[str, int]]:
    """What engine and reception have done so far."""

    def read() -> dict[str, int]:
        async def values() -> dict[str, int]:
            front = server[0].front
            return {**vars(front.counters), **vars(front.reception_counters)}

        return asyncio.run_coroutine_threadsafe(values(), server[1]).result(10)

    return read


def plan(planner: Planner, name: str, picture: Image.Image | None = None, text: str = TEXT, **sampling) -> Planned:
    """A request whose picture is offered under the digest of `name`."""
    item = MediaItem(MediaInfo.image(60, 80), fixed_picture(60, 80) if picture is None else picture)
    planned = planner.plan_items(text, [item], **sampling)
    planned.start.items[0].media_digest = hashlib.sha256(name.encode()).digest()
    return planned


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8))


def anonymous(planned: Planned) -> Planned:
    """The same request offering no digest."""
    twin = Planned(executor_pb2.Start(), planned.tensors)
    twin.start.CopyFrom(planned.start)
    for item in twin.start.items:
        item.ClearField("media_digest")
    return twin


def test_a_picture_sent_before_is_neither_sent_nor_encoded_again(channel, planner, counts) -> None:
    first, second = plan(planner, "again"), plan(planner, "again", text="What else <image> is there?")
    with Peer(channel) as peer:
        expected = peer.run(1, anonymous(second)).tokens
        peer.run(2, first)
        before = counts()
        peer.start(3, second)
        answer = peer.finish(3)
        assert (answer.missing, answer.credit) == ([], 0)
        assert answer.tokens == expected
    after = counts()
    assert after["num_received_bytes"] == before["num_received_bytes"]
    assert after["num_encoded_items"] == before["num_encoded_items"]
    assert after["num_held_items"] == before["num_held_items"] + 1


def test_a_repeated_prompt_is_found_in_the_prefix_cache(channel, planner, counts) -> None:
    planned = plan(planner, "prefix", noise(3))
    with Peer(channel) as peer:
        tokens = peer.run(1, planned).tokens
        peer.start(2, planned)
        answer = peer.finish(2)
    assert answer.tokens == tokens
    length = len(planned.start.prompt_token_ids)
    assert answer.finals[0].completion.usage.cached_tokens == (length - 1) // 16 * 16 > 0


def test_two_pictures_of_one_size_are_not_confused(channel, planner) -> None:
    plans = [plan(planner, f"noise {seed}", noise(seed)) for seed in (1, 2)]
    with Peer(channel) as peer:
        first, second = (peer.run(handle, planned).tokens for handle, planned in enumerate(plans))
        peer.start(5, plans[0])
        assert peer.finish(5).tokens == first
        assert peer.run(6, anonymous(plans[1])).tokens == second
    assert first != second


def test_a_digest_sent_again_with_other_content_means_the_other_content(channel, planner) -> None:
    """Each request is answered with what it sent; the digest's next use with what was sent last."""
    one, two = plan(planner, "moving", noise(11)), plan(planner, "moving", noise(12))
    with Peer(channel) as peer, Peer(channel) as other:
        expected = [peer.run(handle, anonymous(planned)).tokens for handle, planned in ((1, one), (2, two))]
        assert expected[0] != expected[1]
        peer.start(3, one)
        other.start(3, two)
        assert peer.wait_credit(3).missing == other.wait_credit(3).missing == [0]
        peer.send_tensors(3, one)
        assert peer.finish(3).tokens == expected[0]
        other.send_tensors(3, two)
        assert other.finish(3).tokens == expected[1]
        peer.start(4, one)
        assert peer.finish(4).tokens == expected[1]


def test_an_item_on_its_way_is_not_sent_twice_on_a_stream(channel, planner) -> None:
    first, second = plan(planner, "flying", noise(21)), plan(planner, "flying", noise(21))
    with Peer(channel) as peer:
        peer.start(1, first)
        peer.wait_credit(1)
        peer.start(2, second)
        peer.send_tensors(1, first)
        assert peer.finish(2).tokens == peer.finish(1).tokens
        assert (peer.answers[1].missing, peer.answers[2].missing) == ([0], [])


def test_who_awaited_a_cancelled_request_is_asked(channel, planner) -> None:
    first, second = plan(planner, "orphan", noise(22)), plan(planner, "orphan", noise(22))
    with Peer(channel) as peer:
        expected = peer.run(9, anonymous(second)).tokens
        peer.start(1, first)
        peer.wait_credit(1)
        peer.start(2, second)
        peer.send_chunk(1, 0, 0, 0, first.tensors[0].tobytes()[:5000])
        peer.cancel(1)
        assert peer.wait_credit(2).missing == [0]
        peer.send_tensors(2, second)
        assert peer.finish(2).tokens == expected


def test_who_ends_while_tensors_arrive_is_not_kept_by_the_engine(channel, planner, server, monkeypatch) -> None:
    """It has been announced there, and nothing else would ever say that it is not to come."""
    link, sent = server[0].front._link, list[ToEngine]()
    send = link.send
    monkeypatch.setattr(link, "send", lambda message: (sent.append(message), send(message)))
    with Peer(channel) as peer:
        peer.start(1, plan(planner, "never whole", noise(23)))
        peer.wait_credit(1)
        peer.cancel(1)
        assert peer.finish(1).code == grpc.StatusCode.CANCELLED
    (number,) = (message.submit.request_id for message in sent if isinstance(message, Announce))
    assert [message.request_ids for message in sent if isinstance(message, Abort)] == [(number,)]


def test_inline_tensors(channel, planner) -> None:
    planned = anonymous(plan(planner, "inline", noise(31)))
    with Peer(channel) as peer:
        expected = peer.run(1, planned).tokens
        planned.start.items[0].tensors[0].data = planned.tensors[0].tobytes()
        peer.start(2, planned)
        answer = peer.finish(2)
    assert (answer.tokens, answer.credit) == (expected, 0)


def test_a_large_inline_tensor_is_refused(channel, planner, monkeypatch) -> None:
    monkeypatch.setattr("executor_service.front.claims.MAX_INLINE_BYTES", 100)
    planned = plan(planner, "large inline")
    planned.start.items[0].tensors[0].data = planned.tensors[0].tobytes()
    with Peer(channel) as peer:
        peer.start(1, planned)
        answer = peer.finish(1)
    assert (answer.code.name, answer.facts["limit"]) == ("INVALID_ARGUMENT", "100")


def test_who_stalls_is_not_waited_for(channel, planner) -> None:
    """One sends nothing, one stops in the middle, one is slow; only the slow one is served."""
    silent, stopping, slow = (plan(planner, name, noise(40)) for name in ("silent", "stopping", "slow"))
    slow.start.items[0].media_digest = hashlib.sha256(b"slow").digest()
    with Peer(channel) as peer, Peer(channel) as others:
        others.start(1, silent)
        others.start(2, stopping)
        others.wait_credit(2)
        others.send_chunk(2, 0, 0, 0, bytes(100))
        peer.start(3, slow)
        peer.wait_credit(3)
        data = slow.tensors[0].tobytes()
        third = -(-len(data) // 4)
        for offset in range(0, len(data), third):
            time.sleep(0.6)
            peer.send_chunk(3, 0, 0, offset, data[offset : offset + third])
        assert peer.finish(3).tokens
        for handle in (1, 2):
            answer = others.finish(handle)
            assert (answer.code.name, answer.facts["stage"]) == ("DEADLINE_EXCEEDED", "receive")
            assert "no byte arrived for 1.5 s" in answer.status.message


def test_resumption(channel, planner) -> None:
    planned = plan(planner, "resumed", temperature=1.0, seed=3, max_tokens=12)
    with Peer(channel) as peer:
        tokens = peer.run(1, planned).tokens
        planned.start.output_token_ids.extend(tokens[:5])
        peer.start(2, planned)
        answer = peer.finish(2)
    assert answer.tokens == tokens[5:]
    assert answer.finals[0].completion.usage.completion_tokens == 12


def test_items_seen_before_make_room_for_new_ones(channel, planner, server) -> None:
    """1 MiB holds 111 tiles: of 250 pictures the oldest are forgotten, and nothing fails."""
    plans = {handle: plan(planner, f"many {handle}", noise(1000 + handle), max_tokens=1) for handle in range(250)}
    with Peer(channel) as peer:
        for handle, planned in plans.items():
            peer.start(handle, planned)
        for handle, planned in plans.items():
            assert peer.wait_credit(handle).missing == [0]
            peer.send_tensors(handle, planned)
        assert all(peer.finish(handle).tokens for handle in plans)
        for handle, missing in ((0, [0]), (249, [])):
            peer.start(1000 + handle, plans[handle])
            while peer.answers.get(1000 + handle) is None or peer.answers[1000 + handle].missing is None:
                peer.read()
            assert peer.answers[1000 + handle].missing == missing
            peer.cancel(1000 + handle)
            peer.finish(1000 + handle)


def test_priority_goes_first(checkpoint) -> None:
    """One place in the batch: among those that wait, the largest priority is next."""
    settings = ExecutorSettings(model=checkpoint, port=0, max_num_seqs=1, **EXECUTOR_DEFAULTS)
    with (
        service_thread(lambda: ExecutorServer(settings)) as (executor, _),
        grpc.insecure_channel(executor.address, options=CHANNEL_OPTIONS) as channel,
        Peer(channel) as peer,
    ):
        family = executor.front.family
        planner = Planner(family, fingerprint(family).digest)
        ended: list[int] = []
        for handle, priority in enumerate((0, 0, 5, -3, 5)):
            planned = planner.plan("no picture", sizes=(), max_tokens=40 if handle else 400)
            planned.start.priority = priority
            peer.start(handle, planned)
        while len(ended) < 5:
            peer.read()
            ended += [handle for handle, answer in peer.answers.items() if answer.finals and handle not in ended]
    assert ended == [0, 2, 4, 1, 3]
