"""The engine's end of the pipe to the front."""

from __future__ import annotations

import pickle
from multiprocessing.connection import Connection

from executor_service.engine.messages import FromEngine, StepReport


def send(connection: Connection, message: FromEngine) -> None:
    """As `Connection.send` does, but without what it does for objects that processes share, half of its time."""
    connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))


def send_report(connection: Connection, report: StepReport) -> None:
    """The tokens first, for which somebody waits."""
    if not report.tokens.is_empty:
        send(connection, report.tokens)
    send(connection, report.end)
