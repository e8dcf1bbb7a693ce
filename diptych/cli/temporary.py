"""Both services for the length of one request."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable

from diptych.cli.both import LOOPBACK, BothSettings
from diptych.cli.children import Children, Exited, Listening, Signalled, reserved_port
from diptych.cli.serve import start_both
from diptych.client.errors import RequestError


def with_services(arguments: argparse.Namespace, ask: Callable[[str], int]) -> int:
    """Start both services on free ports, call `ask` with the public address, stop them; `ask`'s exit code.

    Their logs are silent below warnings unless asked for: the answer is what this command is about.
    """
    given = {**vars(arguments), "host": LOOPBACK, "port": 0}
    settings = BothSettings(given, defaults={"log_level": "warning", "grace_period": 1.0})
    children = Children(settings.preprocess.grace_period)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with reserved_port(0, LOOPBACK) as port:
            return ask(_start(children, settings, port))
    finally:
        children.stop()
        signal.signal(signal.SIGTERM, before)


def _start(children: Children, settings: BothSettings, executor_port: int) -> str:
    """The public address; RequestError if a service ends before it serves."""
    with children.watching_signals():
        start_both(children, settings, executor_port)
        while True:
            event = children.events.get()
            if isinstance(event, Signalled):
                raise KeyboardInterrupt
            if isinstance(event, Exited):
                raise RequestError("UNAVAILABLE", f"the {event.name} service ended with exit code {event.code}")
            if isinstance(event, Listening) and event.name == "preprocess":
                return event.address


def _interrupt(number: int, frame: object) -> None:
    """SIGTERM ends this command as Ctrl-C does: the services are stopped first."""
    raise KeyboardInterrupt
