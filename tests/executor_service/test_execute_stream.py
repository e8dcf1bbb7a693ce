"""A peer's stream by itself: what waits for a peer that does not read, and who the peer is."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from diptych.service.errors import OverloadedError
from diptych.v1 import executor_pb2
from executor_service import servicer
from executor_service.engine.messages import TokenLogprobs
from executor_service.front import stream


async def test_who_does_not_read_is_not_read(monkeypatch) -> None:
    """Behind answers that nobody fetches nothing more is taken in."""
    monkeypatch.setattr(stream, "MAX_UNREAD", 100)
    one = stream.ExecuteStream(None, "peer")  # type: ignore[arg-type]
    for _ in range(100):
        one.put(executor_pb2.ExecuteResponse())
    await asyncio.wait_for(one.wait_for_room(), 1)
    one.put(executor_pb2.ExecuteResponse())
    waiting = asyncio.create_task(one.wait_for_room())
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await anext(one.responses())
    await asyncio.wait_for(waiting, 1)


async def test_a_stream_that_is_never_read_ends(monkeypatch) -> None:
    """What runs already goes on to make answers; they are not kept for ever."""
    monkeypatch.setattr(stream, "MAX_KEPT", 300)
    one = stream.ExecuteStream(None, "peer")  # type: ignore[arg-type]
    for _ in range(301):
        one.put(executor_pb2.ExecuteResponse())
    with pytest.raises(OverloadedError, match="301 entries of answers were not read; at most 300 are kept"):
        await anext(one.responses())


async def test_log_probabilities_are_unread_entries(monkeypatch) -> None:
    """Twenty beside each token fill a peer's allowance twenty-two times as fast, those of the prompt too."""
    monkeypatch.setattr(stream, "MAX_KEPT", 300)
    scores = TokenLogprobs(1, -0.5, tuple((token, -1.0) for token in range(20)))
    for kind in ("output", "prompt"):
        one = stream.ExecuteStream(None, "peer")  # type: ignore[arg-type]
        for _ in range(14 if kind == "output" else 15):
            if kind == "output":
                one.put_token(1, 1, scores)
                one.flush()
            else:
                one.put_prompt_logprobs(1, [scores])
        with pytest.raises(OverloadedError, match=r"(308|315) entries of answers were not read; at most 300 are kept"):
            await anext(one.responses())


@pytest.mark.parametrize(
    ("identities", "expected"),
    [
        (None, ""),
        ([], ""),
        ([b"b", b"a"], "[b'a', b'b']"),
        ([b"a', b'b"], """[b"a', b'b"]"""),
        ([b"\xff"], "[b'\\xff']"),
    ],
)
def test_who_a_peer_has_proved_to_be(identities: list[bytes] | None, expected: str) -> None:
    context = SimpleNamespace(peer_identities=lambda: identities)
    assert servicer._peer_identity(context) == expected  # type: ignore[arg-type]
