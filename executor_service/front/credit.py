"""Byte credit: how many bytes of item tensors may be on their way, per request, per stream and in all.

A request's bytes go straight to their place in the arena; credit bounds what lies in the transport's buffers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

REQUEST_WINDOW: Final = 4 * 1024 * 1024
"""Bytes of one request that may be on their way."""
STREAM_WINDOW: Final = 32 * 1024 * 1024
"""Bytes of one stream that may be on their way."""
TOTAL_WINDOW: Final = 256 * 1024 * 1024
"""Bytes of all streams that may be on their way."""
MIN_GRANT: Final = 256 * 1024
"""Smaller grants wait for more room, unless nothing else is wanted."""


@dataclass
class Window:
    """`limit` bytes, of which `num_outstanding` are granted and have not arrived."""

    limit: int
    num_outstanding: int = 0

    @property
    def room(self) -> int:
        """Bytes that may still be granted."""
        return self.limit - self.num_outstanding


class RequestCredit:
    """One request's credit: `num_wanted` bytes in all, `num_granted` and `num_received` of them so far."""

    def __init__(self, stream: Window, on_grant: Callable[[int], None]) -> None:
        self.stream = stream
        self.on_grant = on_grant
        self.num_wanted = 0
        self.num_granted = 0
        self.num_received = 0

    @property
    def num_outstanding(self) -> int:
        """Bytes granted that have not arrived."""
        return self.num_granted - self.num_received

    @property
    def next_grant(self) -> int:
        """Bytes to grant now if there were room; 0 while enough is outstanding, so that grants come in large steps."""
        left = self.num_wanted - self.num_granted
        more = min(REQUEST_WINDOW - self.num_outstanding, left)
        return more if more >= min(REQUEST_WINDOW // 2, left) else 0


class CreditOffice:
    """Gives credit in turn, within the windows."""

    def __init__(self, total: int = TOTAL_WINDOW) -> None:
        self.total = Window(total)
        self._waiting: deque[RequestCredit] = deque()

    def want(self, credit: RequestCredit, num_bytes: int = 0) -> None:
        """The request has `num_bytes` more to send."""
        credit.num_wanted += num_bytes
        if credit.next_grant and credit not in self._waiting:
            self._waiting.append(credit)
        self._grant()

    def receive(self, credit: RequestCredit, num_bytes: int) -> None:
        """So many bytes of the request have arrived; at most as many as are outstanding."""
        credit.num_received += num_bytes
        self._return(credit, num_bytes)
        self.want(credit)

    def close(self, credit: RequestCredit) -> None:
        """The request sends no more: what it has not used is free for others."""
        if credit in self._waiting:
            self._waiting.remove(credit)
        self._return(credit, credit.num_outstanding)
        credit.num_wanted = credit.num_granted = credit.num_received
        self._grant()

    def _return(self, credit: RequestCredit, num_bytes: int) -> None:
        credit.stream.num_outstanding -= num_bytes
        self.total.num_outstanding -= num_bytes

    def _grant(self) -> None:
        """One round: everybody who waits gets what fits; those it does not fit wait on, in their order."""
        for _ in range(len(self._waiting)):
            if not self.total.room:
                return
            credit = self._waiting.popleft()
            wish = credit.next_grant
            more = min(wish, credit.stream.room, self.total.room)
            if more < min(wish, MIN_GRANT):
                self._waiting.append(credit)
            elif more:
                credit.num_granted += more
                credit.stream.num_outstanding += more
                self.total.num_outstanding += more
                credit.on_grant(more)
