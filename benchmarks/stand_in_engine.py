"""An engine process without a model: every step gives every live request a token.

Speaks the engine's messages over the engine's pipe, so the front cannot tell.
"""

from __future__ import annotations

import os
import signal
import sys
from multiprocessing.connection import Connection

from executor_service.engine.messages import (
    Abort,
    Announce,
    Booted,
    Complete,
    Counters,
    EngineConfig,
    Finished,
    FinishReason,
    Load,
    MemoryLedger,
    Shutdown,
    StepEnd,
    StepReport,
    StepTokens,
    Submit,
    ToEngine,
)
from executor_service.engine.pipe import send_report
from registry.families import open_family
from registry.fingerprint import fingerprint

MAX_MODEL_LEN = 1 << 20
NUM_BLOCKS = 1 << 16
MAX_NUM_SEQS = 1024
QUIET_VARIABLE = "STAND_IN_QUIET_SECONDS"
QUIET_SECONDS = float(os.environ.get(QUIET_VARIABLE, "0.02"))
"""After a request that finds it idle it waits until no other has come for so long, so that they all run at once."""


class StandInEngine:
    """Live requests by number, and how many tokens each is still to get."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._announced: dict[int, Submit] = {}
        self._left: dict[int, int] = {}
        self._ended: list[Finished] = []
        self._is_stopping = False
        self._num_steps = 0

    def run(self) -> None:
        """Receive, step, send; waits for messages while there is no work."""
        while not self._is_stopping:
            is_idle = not (self._left or self._ended)
            if is_idle:
                self._handle(self._connection.recv())
            while not self._is_stopping and self._connection.poll(QUIET_SECONDS if is_idle else 0):
                self._handle(self._connection.recv())
            if self._left or self._ended:
                send_report(self._connection, self._step())

    def _handle(self, message: ToEngine) -> None:
        match message:
            case Submit():
                self._left[message.request_id] = message.sampling.max_tokens
            case Announce():
                self._announced[message.submit.request_id] = message.submit
            case Complete():
                self._handle(self._announced.pop(message.request_id))
            case Abort():
                for number in message.request_ids:
                    self._announced.pop(number, None)
                gone = [number for number in message.request_ids if self._left.pop(number, None) is not None]
                self._ended += [Finished(number, FinishReason.ABORTED) for number in gone]
            case Shutdown():
                self._is_stopping = True

    def _step(self) -> StepReport:
        """Token ids are small: one byte on the wire, or two."""
        numbers = list(self._left)
        self._num_steps += 1
        ended, self._ended = self._ended, []
        for number in numbers:
            self._left[number] -= 1
            if not self._left[number]:
                del self._left[number]
                ended.append(Finished(number, FinishReason.LENGTH))
        token_ids = [4 + self._num_steps % 250] * len(numbers)
        end = StepEnd(ended, Load(len(self._left), 0, 0, NUM_BLOCKS), Counters(), len(token_ids))
        return StepReport(StepTokens(numbers, token_ids, []), end)


def booted(config: EngineConfig) -> Booted:
    """What a real engine on the same checkpoint would say of itself, but for memory and limits."""
    family = open_family(config.model_dir, config.limits, config.plugins)
    ledger = MemoryLedger(0, 0.0, 0, 0, 0, 0, 0, 0, config.block_size, NUM_BLOCKS, 0, False)
    return Booted(
        device="cpu",
        dtype="float32",
        architecture=family.ctx.architecture,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=config.max_num_seqs or MAX_NUM_SEQS,
        max_num_batched_tokens=config.max_num_batched_tokens or MAX_MODEL_LEN,
        vocab_size=family.ctx.vocab_size,
        eos_token_ids=frozenset(),
        max_tokens_per_item={modality: family.max_tokens(modality) for modality in family.modalities},
        fingerprint=fingerprint(family),
        ledger=ledger,
    )


def main(argv: list[str]) -> int:
    """Boot and run; the arena is not looked at."""
    connection_fd, arena_fd, _ = (int(argument) for argument in argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.close(arena_fd)
    connection = Connection(connection_fd)
    connection.send(booted(connection.recv()))
    try:
        StandInEngine(connection).run()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
