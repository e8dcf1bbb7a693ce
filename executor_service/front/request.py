"""A request between its admission and its Final, and where its messages go."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Protocol

from diptych.service.errors import DiptychError
from diptych.service.telemetry import RequestSpan
from diptych.v1 import executor_pb2
from executor_service.engine.messages import TokenLogprobs
from executor_service.front.admission import AdmittedRequest
from executor_service.front.assembly import ItemAssembly
from executor_service.front.credit import RequestCredit, Window
from executor_service.front.item_store import Claim, Sender


class Outlet(Protocol):
    """Where a request's messages go: its stream."""

    sender: Sender
    window: Window
    is_half_closed: bool

    def put_token(self, handle: int, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """An output token; sent with the others of this step at the next `flush`."""

    def put_prompt_logprobs(self, handle: int, entries: list[TokenLogprobs]) -> None:
        """Log probabilities of the next prompt tokens, at once: before the tokens of the step."""

    def put(self, response: executor_pb2.ExecuteResponse) -> None:
        """A control message, at once."""

    def put_final(self, final: executor_pb2.Final) -> None:
        """The request's last message, at once, after the tokens of the step."""

    def flush(self) -> None:
        """Send what the step has given."""


@dataclass(frozen=True)
class Pace:
    """Where receiving stood at a moment: bytes received so far, and bytes that had been asked for beyond them."""

    moment: float
    num_received: int
    num_outstanding: int


@dataclass(eq=False)
class FrontRequest:
    """One request. `claim` are its items, `assemblies` those that are arriving, by index; see Reception."""

    number: int
    handle: int
    outlet: Outlet
    admitted: AdmittedRequest
    span: RequestSpan
    started: float = field(default_factory=time.monotonic)
    received: float | None = None
    claim: Claim | None = None
    is_placed: bool = False
    assemblies: dict[int, ItemAssembly] = field(default_factory=dict)
    credit: RequestCredit | None = None
    last_receipt: float = 0.0
    pace: Pace | None = None
    receive_timer: asyncio.TimerHandle | None = None
    deadline: asyncio.TimerHandle | None = None
    is_announced: bool = False
    is_at_engine: bool = False
    is_stopped: bool = False
    error: DiptychError | None = None
    num_output_tokens: int = 0

    @property
    def stage(self) -> str:
        """Where the request is, for errors."""
        if not self.is_at_engine:
            return "receive"
        return "generate" if self.num_output_tokens else "queue"
