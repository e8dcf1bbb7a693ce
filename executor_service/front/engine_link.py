"""The engine process as the front sees it: started, spoken to, listened to, and noticed when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Final

from diptych.service.errors import UnavailableError
from executor_service.engine.messages import (
    Booted,
    BootFailed,
    BootProgress,
    EngineConfig,
    EngineFailed,
    FromEngine,
    Shutdown,
    StepEnd,
    StepTokens,
    ToEngine,
)
from executor_service.front.arena import Arena
from executor_service.front.engine_outbox import EngineOutbox

ENGINE_MODULE: Final = "executor_service.engine.process"
"""What runs in the engine process; another module may that speaks the same messages."""
ENVIRONMENT: Final = {"OMP_WAIT_POLICY": "PASSIVE", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
"""Of an engine, where nobody has set it otherwise.

Between its steps an OpenMP thread that spins takes the cores from everything else on the host. Segments that grow keep
a GPU's memory whole between tensors of changing sizes.
"""


class EngineLink:
    """One engine process. Callbacks run in the event loop that called `launch`."""

    def __init__(
        self,
        on_progress: Callable[[BootProgress], None],
        on_tokens: Callable[[StepTokens], None],
        on_step_end: Callable[[StepEnd], None],
        engine_module: str = ENGINE_MODULE,
    ) -> None:
        self._on_progress = on_progress
        self._on_tokens = on_tokens
        self._on_step_end = on_step_end
        self._engine_module = engine_module
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._outbox: EngineOutbox | None = None
        self._booted: asyncio.Future[Booted] | None = None
        self._last_word = ""
        self.died: asyncio.Future[str] | None = None

    def launch(self, config: EngineConfig, arena: Arena) -> None:
        """Start the process, which begins to boot, and listen to it."""
        loop = asyncio.get_running_loop()
        self._booted, self.died = loop.create_future(), loop.create_future()
        # Looked at, whether or not anybody still waits: who cannot listen, or is told to stop, does not.
        self._booted.add_done_callback(lambda booted: booted.cancelled() or booted.exception())
        self._connection, theirs = Pipe(duplex=True)
        with theirs:
            self._process = _spawn(self._engine_module, theirs.fileno(), arena)
        self._connection.send(config)
        self._outbox = EngineOutbox(self._connection)
        loop.add_reader(self._connection.fileno(), self._read)

    async def wait_booted(self) -> Booted:
        """What the engine says of itself; UnavailableError with its own words if it cannot boot."""
        assert self._booted is not None
        return await self._booted

    def send(self, message: ToEngine) -> None:
        """Send a message; never blocks, whatever the engine is doing."""
        if self._outbox is not None:
            self._outbox.send(message)

    async def stop(self, patience: float = 5.0) -> None:
        """Ask the engine to end, and end it if it does not, or is still booting: then nobody waits for its answers."""
        if self._process is None:
            return
        if not self._is_booted:
            self._process.kill()
        self.send(Shutdown())
        try:
            await asyncio.to_thread(self._process.wait, patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        self._close()
        self._process = None

    @property
    def _is_booted(self) -> bool:
        booted = self._booted
        # Whoever waited may have been cancelled, and the future with it.
        return booted is not None and booted.done() and not booted.cancelled() and booted.exception() is None

    def _read(self) -> None:
        """Handle one message, so that a fast engine leaves the loop time to send what it made.

        The loop calls again while there is more. A connection at its end means that the engine is gone.
        """
        connection = self._connection
        assert connection is not None
        try:
            self._handle(connection.recv())
        except (EOFError, OSError):
            self._note_death()

    def _handle(self, message: FromEngine) -> None:
        assert self._booted is not None
        match message:
            case StepTokens():
                self._on_tokens(message)
            case StepEnd():
                self._on_step_end(message)
            case BootProgress():
                self._on_progress(message)
            case Booted() if not self._booted.done():
                self._booted.set_result(message)
            case BootFailed() if not self._booted.done():
                self._booted.set_exception(UnavailableError(message.message, stage="boot"))
            case EngineFailed():
                self._last_word = f": {message.message}"

    def _note_death(self) -> None:
        assert self._process is not None
        assert self._booted is not None
        assert self.died is not None
        self._close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        reason = f"the engine process ended with exit code {self._process.returncode}{self._last_word}"
        if not self._booted.done():
            self._booted.set_exception(UnavailableError(f"{reason} while booting", stage="boot"))
        if not self.died.done():
            self.died.set_result(reason)

    def _close(self) -> None:
        if self._connection is not None and not self._connection.closed:
            asyncio.get_running_loop().remove_reader(self._connection.fileno())
            if self._outbox is not None:
                self._outbox.close()
                self._outbox = None
            self._connection.close()


def _spawn(module: str, connection_fd: int, arena: Arena) -> subprocess.Popen[bytes]:
    """The engine imports what this process can import; its prints go where logs go.

    SIGINT is blocked in it from its first instruction on: Ctrl-C reaches the whole process group, and would be a
    traceback in its imports.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-m", module, str(connection_fd), str(arena.fd), str(arena.num_bytes)],
            pass_fds=(connection_fd, arena.fd),
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
            env={**ENVIRONMENT, **os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
