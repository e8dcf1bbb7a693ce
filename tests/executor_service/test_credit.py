"""Byte credit: within every window, in large steps, to everybody in turn."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from executor_service.front.credit import MIN_GRANT, REQUEST_WINDOW, STREAM_WINDOW, CreditOffice, RequestCredit, Window

BIG = 3 * REQUEST_WINDOW + 12345


class Sender:
    """One request that sends what it may."""

    def __init__(self, stream: Window) -> None:
        self.grants: list[int] = []
        self.credit = RequestCredit(stream, self.grants.append)


def test_one_request_gets_its_window_and_then_large_steps() -> None:
    office, sender = CreditOffice(), Sender(Window(STREAM_WINDOW))
    office.want(sender.credit, BIG)
    assert sender.grants == [REQUEST_WINDOW]
    received = 0
    while received < BIG:
        size = min(1 << 20, BIG - received)
        assert size <= sender.credit.num_outstanding <= REQUEST_WINDOW
        office.receive(sender.credit, size)
        received += size
    assert sum(sender.grants) == BIG
    assert min(sender.grants[:-1]) >= REQUEST_WINDOW // 2
    assert office.total.num_outstanding == sender.credit.stream.num_outstanding == 0


def test_a_full_stream_does_not_stop_another() -> None:
    office, full, other = CreditOffice(), Window(REQUEST_WINDOW), Window(REQUEST_WINDOW)
    first, second, third = Sender(full), Sender(full), Sender(other)
    for sender in (first, second, third):
        office.want(sender.credit, BIG)
    assert (first.grants, second.grants, third.grants) == ([REQUEST_WINDOW], [], [REQUEST_WINDOW])
    office.receive(first.credit, REQUEST_WINDOW)
    assert sum(second.grants) == REQUEST_WINDOW, "who waited is first"


def test_the_end_of_a_request_frees_its_credit() -> None:
    office, stream = CreditOffice(total=REQUEST_WINDOW), Window(STREAM_WINDOW)
    first, second = Sender(stream), Sender(stream)
    office.want(first.credit, BIG)
    office.want(second.credit, 10)
    assert second.grants == []
    office.close(first.credit)
    assert second.grants == [10]
    assert office.total.num_outstanding == 10


@settings(max_examples=150)
@given(
    wants=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 20 * 2**20)), min_size=1, max_size=8),
    total=st.integers(MIN_GRANT, 24 * 2**20),
    data=st.data(),
)
def test_windows_hold_and_everybody_finishes(wants: list[tuple[int, int]], total: int, data: st.DataObject) -> None:
    office, streams = CreditOffice(total), [Window(6 * 2**20) for _ in range(3)]
    senders = []
    for stream, size in wants:
        senders.append(Sender(streams[stream]))
        office.want(senders[-1].credit, size)
    for _ in range(3000):
        ready = [sender for sender in senders if sender.credit.num_outstanding]
        if not ready:
            break
        sender = data.draw(st.sampled_from(ready))
        office.receive(sender.credit, min(1 << 20, sender.credit.num_outstanding))
        assert office.total.num_outstanding <= total
        assert office.total.num_outstanding == sum(s.credit.num_outstanding for s in senders)
        for number, stream in enumerate(streams):
            mine = [s for s, (n, _) in zip(senders, wants, strict=True) if n == number]
            assert stream.num_outstanding == sum(s.credit.num_outstanding for s in mine) <= stream.limit
        assert all(s.credit.num_outstanding <= REQUEST_WINDOW for s in senders)
    for sender, (_, size) in zip(senders, wants, strict=True):
        assert sender.credit.num_received == size


@pytest.mark.parametrize("left", [1, MIN_GRANT - 1])
def test_a_small_rest_is_granted_though_it_is_small(left: int) -> None:
    office, sender = CreditOffice(), Sender(Window(STREAM_WINDOW))
    office.want(sender.credit, left)
    assert sender.grants == [left]
