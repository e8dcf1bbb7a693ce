"""Services as child processes: started, watched, stopped together, and never left behind."""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

LISTENING: Final = "listening on "
_PR_SET_PDEATHSIG: Final = 1
_KILL_AFTER: Final = 5.0
"""Seconds a child may take to end beyond its grace period."""


@dataclass(frozen=True, slots=True)
class Listening:
    """A child is SERVING at `address`."""

    name: str
    address: str


@dataclass(frozen=True, slots=True)
class Exited:
    """A child has ended by itself."""

    name: str
    code: int


@dataclass(frozen=True, slots=True)
class Signalled:
    """This process was asked to stop."""

    number: int


Event = Listening | Exited | Signalled


@contextmanager
def reserved_port(port: int, host: str) -> Iterator[int]:
    """`port`, or a free one if it is 0, which no other process is given while the block runs.

    The socket is bound and never listens, so that a server which names the port may still take it.
    """
    if port:
        yield port
        return
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind((host, 0))
        yield int(reserved.getsockname()[1])


class Children:
    """Child processes by name. `events` tells what happens to them, and of signals to this process."""

    def __init__(self, grace: float) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._grace = grace
        self._is_stopping = self._is_hurried = False
        self._processes: dict[str, subprocess.Popen[str]] = {}

    def start(self, name: str, arguments: Sequence[str]) -> None:
        """Start `diptych ARGUMENTS`; it is sent SIGTERM when this process ends, however it ends.

        It has a process group of its own: Ctrl-C reaches this process alone, which then stops the children
        in order.
        """
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "diptych.cli.main", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=_DieWithParent(),  # noqa: PLW1509  # this process has no other threads that hold locks
        )
        self._processes[name] = process
        threading.Thread(target=self._watch, args=(name, process), daemon=True).start()

    def stop(self) -> None:
        """Stop every child, the last one started first, and wait until each has ended.

        A SIGINT meanwhile, while signals are watched, takes what is left of their grace period away.
        """
        self._is_stopping = True
        for process in reversed(self._processes.values()):
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(_KILL_AFTER + (0.0 if self._is_hurried else self._grace))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    @contextmanager
    def watching_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM become events while the block runs."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        # SimpleQueue.put is the one that may be called from a signal handler.
        self.events.put(Signalled(number))
        if self._is_stopping and number == signal.SIGINT:
            self._is_hurried = True
            for process in self._processes.values():
                process.send_signal(number)

    def _watch(self, name: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                if line.startswith(LISTENING):
                    self.events.put(Listening(name, line.removeprefix(LISTENING).strip()))
                else:
                    sys.stderr.write(line)
        self.events.put(Exited(name, process.wait()))


class _DieWithParent:
    """Runs in the child before it becomes its program: the kernel sends SIGTERM when the parent dies (Linux)."""

    def __init__(self) -> None:
        self._parent = os.getpid()
        # Loaded here, because after a fork as little as possible should happen.
        self._libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def __call__(self) -> None:
        if self._libc is not None:
            self._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != self._parent:  # it died in between
                os._exit(1)
